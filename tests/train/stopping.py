"""Program for test_stopping.py: trains in forked processes, sends them signals, and tells how each
ended.

torch is loaded once. Usage: stopping.py PLANS, a JSON list of runs, each with

    arguments  of `castalia train`, with `output=`
    at         "step", "validation" or "save": what is slow in this run, and when the signals come;
               "nothing" in a run that is left alone
    seconds    how long that takes; a step of a whole minute is one that nobody waits for
    signals    their names, a quarter of a second apart, to the first rank
    ranks      processes, 1 by default
    reader     "gone": the reader of the output ends with the first signal, as `tee` does on Ctrl-C
    ignore     a signal that is ignored from the beginning, as under nohup

Prints, for each run, the exit statuses of the ranks, the seconds from the first signal to the end,
the batches that were validated, and what the first rank wrote to stdout and stderr.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed.fsdp
from tests.fixtures.forked_rank import join_ranks, run_and_exit
from tests.fixtures.ports import held_port

import castalia.checkpoint.stage
import castalia.train.run
import castalia.train.trainer
from castalia.train.passes import Passes

BATCHES = "batches"
"""File of a run with a character for each batch that a rank validated."""
STEPS_BEFORE = 2
"""The slow step, validation or save comes after so many steps."""


def slow_down(plan, marker, folder):
    """Make one part of the run slow, and write to `marker` when it begins."""
    train, run = Passes.train, Passes.run
    fsync = os.fsync
    state = {"steps": 0, "told": False}

    def tell():
        if not state["told"]:
            state["told"] = True
            os.write(marker, b"!")

    def slow_train(self, *arguments):
        state["steps"] += 1
        if plan["at"] == "step" and state["steps"] > STEPS_BEFORE:
            tell()
            time.sleep(plan["seconds"])
        return train(self, *arguments)

    def slow_run(self, *arguments):
        if plan["at"] == "validation":
            tell()
            with open(folder / BATCHES, "a") as file:
                file.write(".")
            time.sleep(plan["seconds"])
        return run(self, *arguments)

    def slow_fsync(descriptor):
        # The last save alone, whose thread has the name of its step.
        if plan["at"] == "save" and threading.current_thread().name == f"save-{STEPS_BEFORE + 1}":
            tell()
            time.sleep(plan["seconds"])
        fsync(descriptor)

    Passes.train, Passes.run, os.fsync = slow_train, slow_run, slow_fsync


def fork(rank, plan, port, outputs, marker, folder):
    """Start one rank; its process id."""
    child = os.fork()
    if child:
        return child
    if plan.get("ranks", 1) > 1:
        join_ranks(rank, plan["ranks"], port)
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, descriptor)
    # Else the pipe has this process for a reader.
    os.closerange(marker + 1, 256)
    # A shell script that starts the tests in the background has them ignore SIGINT, nohup SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if name := plan.get("ignore"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    slow_down(plan, marker, folder)
    run_and_exit(["train", *plan["arguments"]])


def run(plan):
    """One run; how it ended."""
    folder = Path(next(a for a in plan["arguments"] if a.startswith("output=")).partition("=")[2])
    folder.mkdir(parents=True, exist_ok=True)
    begun, marker = os.pipe()
    pipe, written = os.pipe()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    names = ("out", "err", "other")
    out, err, other = (os.open(folder / f"{name}.txt", flags) for name in names)
    if plan.get("reader"):
        out = written
    ranks = []
    with held_port() as port:
        for rank in range(plan.get("ranks", 1)):
            outputs = (out, err) if rank == 0 else (other, other)
            ranks.append(fork(rank, plan, port, outputs, marker, folder))
    os.close(written)
    os.close(marker)
    # Nothing comes from a run that ends by itself.
    os.read(begun, 1)
    since = time.monotonic()
    if plan.get("reader"):
        os.close(pipe)
    for place, name in enumerate(plan["signals"]):
        time.sleep(0.25 if place else 0.05)
        os.kill(ranks[0], signal.Signals[name])
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    ended = {"codes": codes, "seconds": time.monotonic() - since}
    validated = folder / BATCHES
    ended["batches"] = len(validated.read_text()) if validated.exists() else 0
    return ended | {name: (folder / f"{name}.txt").read_text() for name in names}


if __name__ == "__main__":
    assert castalia.train.trainer and torch.distributed.fsdp  # loaded before the forks
    torch.set_num_threads(1)
    print(json.dumps([run(plan) for plan in json.loads(sys.argv[1])]))
