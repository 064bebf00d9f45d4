"""A process that hangs is named with its stack, and the job ends; and how the blame is found."""

import os
import subprocess
import sys
import time

import pytest
import torch

from castalia.distributed import World
from castalia.distributed.watchdog import Watchdog, at_fault

SMALL = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "data.seq_length=16",
    "checkpoint.every=null",
    "train.steps=9",
)
PROGRAM = """
import os, signal, sys, time, ctypes
import castalia.losses as loss
call = loss.NextToken.__call__
def a_loss_that_hangs(self, scored, batch):
    if int(os.environ["RANK"]) == 1 and int(batch.index[0]) >= 24:
        {hang}
    return call(self, scored, batch)
loss.NextToken.__call__ = a_loss_that_hangs
from castalia.cli import main
main()
"""
# A child ends it in the end: torchrun would wait 30 s before it kills what is stopped.
ENDED = "me = os.getpid(); os.fork() or (time.sleep(14), os.kill(me, signal.SIGKILL), os._exit(0))"
HANGS = {
    "asleep": "time.sleep(1000)",
    "stopped": f"{ENDED}; time.sleep(2); os.kill(me, signal.SIGSTOP)",
}


def start(folder, code):
    """Two processes of which rank 1 runs `code` in its third step; they write to files in the
    folder."""
    script = folder / "hang.py"
    script.write_text(PROGRAM.format(hang=code))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    command += ["--nproc-per-node=2", "--shutdown-timeout=2", str(script), "train", "debug", *SMALL]
    command += ["guard.hang_seconds=3", f"output={folder / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


def end(job, folder):
    """What the processes said until they ended, with an error."""
    try:
        assert job.wait(timeout=200) != 0
    finally:
        job.kill()
    return (folder / "err.txt").read_text()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the processes of each case of `HANGS` said; they hang at the same time."""
    folders = {name: tmp_path_factory.mktemp(name) for name in HANGS}
    jobs = {name: start(folder, HANGS[name]) for name, folder in folders.items()}
    return {name: end(job, folders[name]) for name, job in jobs.items()}


def test_a_hung_rank_prints_its_stack_and_the_others_name_it(reports):
    said = reports["asleep"]
    assert "castalia: error: rank 1 hangs: no progress for " in said
    assert " s in step 3 (passes and update); its threads:" in said
    # Its own print; rank 0 has the stack too, unless the job ends before it could read it.
    assert said.count("in a_loss_that_hangs") in (1, 2)
    assert "castalia: error: rank 0 waits for rank 1, which hangs: no progress for " in said
    assert "guard.hang_seconds=3" in said


def test_a_stopped_process_is_named_with_the_stack_that_it_told_last(reports):
    said = reports["stopped"]
    assert "rank 0 waits for rank 1, which hangs and is silent: no progress for " in said
    assert "in step 3 (passes and update); the last stack it wrote:" in said
    assert "in a_loss_that_hangs" in said


@pytest.mark.slow
def test_a_process_that_never_lets_go_of_the_lock_is_named_and_ends(tmp_path):
    job = start(tmp_path, "time.sleep(2); ctypes.PyDLL(None).sleep(1000)")
    said = end(job, tmp_path)
    assert "rank 0 waits for rank 1, which hangs and is silent" in said


def told(tick, late=False, waits=False, step=3):
    return {"tick": tick, "step": step, "late": late, "waits": waits}


def readings(*ranks):
    """Four readings of the ranks; each is given by its entry, and ticks unless it is `silent`."""
    return [
        [rank and rank | {"tick": rank["tick"] + (rank["tick"] > 0) * n} for rank in ranks]
        for n in range(4)
    ]


def test_who_is_to_blame():
    waiting, hung, busy, silent = told(1, True, True), told(1, True), told(1), told(0, True)
    assert at_fault(readings(waiting, hung, waiting)) == [1]
    assert at_fault(readings(waiting, busy, waiting)) == []
    assert at_fault(readings(waiting, hung, silent)) == [2]
    assert at_fault(readings(waiting, None)) == [1]
    assert at_fault(readings(hung, waiting, hung)) == [0, 2]
    assert at_fault(readings(told(1, True, True, step=4), waiting)) == [
        1
    ]  # all wait: the one that is behind
    assert at_fault(readings(waiting, waiting)) == [0, 1]


def test_a_block_is_named_while_it_runs_and_the_limit_starts_again():
    watchdog = Watchdog(World(0, 1, torch.device("cpu")), seconds=100.0)
    watchdog.step_begins(3)
    with watchdog.doing("saving", patience=10):
        assert (watchdog.step, watchdog.what, watchdog.patience) == (3, "saving", 10)
        watchdog.at -= 50
        watchdog.progressed()
        assert time.monotonic() - watchdog.at < 40 and watchdog.what == "saving"
    assert (watchdog.what, watchdog.patience) == ("reading data", 1.0)
    with pytest.raises(KeyError), watchdog.doing("update"):
        raise KeyError
    assert watchdog.what == "reading data"


def test_one_process_is_watched_when_it_is_asked_for(monkeypatch, capfd):
    alone = World(0, 1, torch.device("cpu"))
    assert Watchdog(alone).seconds == 0
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Watchdog(alone, 1.0) as watchdog:
        for step in range(1, 15):
            watchdog.step_begins(step)
            time.sleep(0.1)
        assert not ended
        watchdog.beat(12, "saving", patience=10)
        time.sleep(1.5)
        assert not ended
        watchdog.beat(12, "reading data")
        while not ended:
            time.sleep(0.05)
    assert ended[0] == 1
    said = capfd.readouterr().err
    assert "rank 0 hangs: no progress for " in said and "in step 12 (reading data)" in said
    assert "test_one_process_is_watched" in said
