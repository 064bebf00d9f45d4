"""A process that hangs is named with its stack, and the job ends; and how the blame is found."""

import os
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
import ctypes, os, signal, socket, time
import castalia.losses as loss
from castalia.distributed.watchdog import Watchdog
call, enter, watchdogs = loss.NextToken.__call__, Watchdog.__enter__, []
def watching(self):
    watchdogs.append(self)
    return enter(self)
def after_two_ticks():
    # By then the thread has told where this one is.
    now = watchdogs[0].ticks
    while watchdogs[0].ticks < now + 2:
        time.sleep(0.05)
def end_with_rank_0():
    # As torchrun, which kills what is left: a child waits until the store of rank 0 is gone.
    me, place = os.getpid(), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.fork():
        return
    try:
        while True:
            socket.create_connection(place).close()
            time.sleep(0.1)
    finally:
        os.kill(me, signal.SIGKILL)
        os._exit(0)
def a_loss_that_hangs(self, scored, batch):
    if int(os.environ["RANK"]) == 1 and int(batch.index[0]) >= 24:
        {hang}
    return call(self, scored, batch)
loss.NextToken.__call__, Watchdog.__enter__ = a_loss_that_hangs, watching
"""
HANGS = {
    "asleep": "time.sleep(1000)",
    "stopped": "end_with_rank_0(); after_two_ticks(); os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.fixture(scope="module")
def said_when(training_shell, tmp_path_factory):
    """said_when(code): what two ranks say of which rank 1 runs `code` in its third step."""

    def say(code):
        output = tmp_path_factory.mktemp("hang") / "run"
        words = ["train", "debug", *SMALL, "guard.hang_seconds=3", f"output={output}"]
        done = training_shell.castalia(words, 2, PROGRAM.format(hang=code))
        assert done.returncode != 0
        return done.stderr

    return say


def test_a_hung_rank_prints_its_stack_and_the_others_name_it(said_when):
    said = said_when(HANGS["asleep"])
    assert "castalia: error: rank 1 hangs: no progress for " in said
    assert " s in step 3 (passes and update); its threads:" in said
    # Its own print; rank 0 has the stack too, unless the job ends before it could read it.
    assert said.count("in a_loss_that_hangs") in (1, 2)
    # On a busy machine rank 1 may be gone before rank 0 has asked for it.
    names = "castalia: error: rank 0 waits for rank 1, which hangs: no progress for "
    assert names in said or "rank 0 lost contact with another rank" in said
    assert "guard.hang_seconds=3" in said


def test_a_stopped_process_is_named_with_the_stack_that_it_told_last(said_when):
    said = said_when(HANGS["stopped"])
    assert "rank 0 waits for rank 1, which hangs and is silent: no progress for " in said
    assert "in step 3 (passes and update); the last stack it wrote:" in said
    assert "in a_loss_that_hangs" in said


@pytest.mark.slow
def test_a_process_that_never_lets_go_of_the_lock_is_named_and_ends(said_when):
    said = said_when("after_two_ticks(); ctypes.PyDLL(None).sleep(1000)")
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
    watchdog = Watchdog(alone, 100.0)
    # It looks often; the seconds pass on its clock alone, whatever the machine does.
    watchdog.tick = 0.01

    def seconds_later(seconds):
        now = watchdog.ticks
        watchdog.at -= seconds
        while watchdog.ticks < now + 3:
            time.sleep(0.01)

    with watchdog:
        for step in range(1, 6):
            watchdog.step_begins(step)
            seconds_later(60)
        assert not ended
        watchdog.beat(12, "saving", patience=10)
        seconds_later(600)
        assert not ended
        watchdog.beat(12, "reading data")
        seconds_later(1000)
        while not ended:
            time.sleep(0.01)
    assert ended[0] == 1
    said = capfd.readouterr().err
    assert "rank 0 hangs: no progress for " in said and "in step 12 (reading data)" in said
    assert "test_one_process_is_watched" in said
