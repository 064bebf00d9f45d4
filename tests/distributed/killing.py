"""Program for test_killed.py: trains on several processes, one of them killed again and again, and
starts all anew.

It stands in for torchrun --max-restarts, without its price: torch is loaded once, and the ranks are
forked from here. Usage: killing.py PLANS, a JSON list of runs with `output`,
`arguments` and `attempts`, which each have `processes` and `kill`: a seed of the victim and the
moment, or null for none. Prints, for each attempt, who was killed after which step, what the kill
left of a save, and how the others ended.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed.fsdp
from tests.fixtures.forked_rank import join_ranks, run_and_exit
from tests.fixtures.ports import held_port

import castalia.train.run

SLOW_SYNC = 0.004
"""Seconds that each fsync takes longer, so that saves take as long as steps."""


def slow_disk():
    """Saves that take about as long as steps do."""
    fsync = os.fsync

    def slow(descriptor):
        time.sleep(SLOW_SYNC)
        fsync(descriptor)

    os.fsync = slow


def start(rank, processes, port, arguments, log):
    """Fork one rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    join_ranks(rank, processes, port)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    run_and_exit(arguments)


def steps_done(output):
    """Number of the last step in metrics.jsonl."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len(lines)


def wait_for_moment(output, chance, ranks):
    """Return after some new steps and part of another; False if a rank exited before."""
    wanted = (output / "log.txt").read_text().count("tok/s") + chance.randint(
        2, 5
    )  # that many lines of steps
    while True:
        if (output / "log.txt").read_text().count("tok/s") >= wanted:
            time.sleep(chance.uniform(0.0, 0.1))
            return True
        if any(os.waitpid(rank, os.WNOHANG)[0] for rank in ranks):
            return False
        time.sleep(0.002)


def attempt(arguments, output, processes, seed):
    """Run all ranks once, with a kill if there is a seed; what happened."""
    (output / "log.txt").touch()
    chance = random.Random(seed)
    with held_port() as port:
        ranks = [
            start(rank, processes, port, arguments, output / "log.txt") for rank in range(processes)
        ]
    told = {"processes": processes, "killed": None}
    if seed is not None:
        victim = chance.randrange(processes)
        assert wait_for_moment(output, chance, ranks), "a rank ended before it could be killed"
        os.kill(ranks[victim], signal.SIGKILL)
        os.waitpid(ranks.pop(victim), 0)
        told |= {"killed": victim, "step": steps_done(output)}
        told["torn"] = sorted(item.name for item in (output / "checkpoints").glob(".step-*"))
    told["codes"] = [wait_as_torchrun_does(rank, hurried=seed is not None) for rank in ranks]
    return told


def wait_as_torchrun_does(rank, hurried):
    """Exit status of a rank; after a death it is asked to end, and made to when it does not."""
    ask, force = time.monotonic() + 0.3, time.monotonic() + 1.5
    while True:
        done, status = os.waitpid(rank, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if hurried and time.monotonic() > force:
            os.kill(rank, signal.SIGKILL)
        elif hurried and time.monotonic() > ask:
            os.kill(rank, signal.SIGTERM)
            ask = force
        time.sleep(0.005)


def main(plan):
    """All attempts of one run, one after another."""
    output = Path(plan["output"])
    output.mkdir(parents=True, exist_ok=True)
    arguments = [*plan["arguments"], f"output={output}"]
    return [
        attempt(arguments, output, each["processes"], each["kill"]) for each in plan["attempts"]
    ]


if __name__ == "__main__":
    assert castalia.train.run and torch.distributed.fsdp  # loaded before the forks
    torch.set_num_threads(1)
    slow_disk()
    print(json.dumps([main(plan) for plan in json.loads(sys.argv[1])]))
