"""What reads in the background: in order, after a fork, and no burden for the end of a process."""

import os
import subprocess
import sys
import threading
import time

import pytest
from tests.storage.server import Link

from castalia.core import background
from castalia.core.background import Background
from castalia.core.workers import WorkerPool
from castalia.storage import ObjectStore, StorageError
from castalia.storage.objects import RANGE_BYTES

HANGS = """
import sys, threading, time
from castalia.storage import ObjectStore, Transfer
from castalia.storage.objects import Facts
from castalia.storage.ranged import RangedFile
from pathlib import Path
store = ObjectStore("s3://bucket", Transfer(retries=12))
file = RangedFile(store, "text.bin", Facts(1 << 22, "tag"), Path(sys.argv[1]))
file.fetch(0, 1 << 22)
time.sleep(1.0)
print("end")
"""
"""Begins to fetch from a server that hangs, and ends."""


def test_results_errors_and_a_fork():
    pool = Background(2, "test")
    gate = threading.Event()
    first = [pool.submit(gate.wait, 10) for _ in range(2)]
    third = pool.submit(divmod, 7, 2)
    assert not third.done()
    gate.set()
    assert all(each.result(10) for each in first) and third.result(10) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 1, 0).result(10)
    assert pool.started == 2
    child = os.fork()
    if child == 0:
        os._exit(pool.submit(lambda: 3).result(10))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_threads_without_work_end(monkeypatch):
    monkeypatch.setattr("castalia.core.background.IDLE_SECONDS", 0.01)
    pool = Background(4, "short")
    assert [pool.submit(abs, -1).result(10) for _ in range(3)] == [1, 1, 1]
    end = time.monotonic() + 10
    while pool.started and time.monotonic() < end:
        time.sleep(0.01)
    assert (pool.started, pool.idle) == (0, 0)
    assert pool.submit(abs, -2).result(10) == 2


def test_a_shutdown_waits_for_so_long_and_says_what_it_leaves(monkeypatch, capsys):
    monkeypatch.setattr(background, "PATIENCE", 0.1)
    pool = Background(1, "reading ahead")
    gate = threading.Event()
    running = pool.submit(gate.wait, 60)
    queued = pool.submit(abs, -1)
    while not running.running():
        time.sleep(0.01)
    pool.shutdown(cancel_futures=True)
    assert queued.cancelled()
    assert "castalia: reading ahead did not end within 0.1 s" in capsys.readouterr().err
    gate.set()
    assert running.result(10)
    pool.shutdown(cancel_futures=True)
    assert capsys.readouterr().err == ""


def test_workers_that_hang_are_killed_at_the_end(capsys):
    pool = WorkerPool(1, abs, -1, patience=0.2)
    assert pool.submit(abs, -3).result(60) == 3
    stuck = pool.submit(time.sleep, 60)
    while not stuck.running():
        time.sleep(0.01)
    begun = time.monotonic()
    pool.shutdown(cancel_futures=True)
    assert time.monotonic() - begun < 30
    assert "a worker process did not end within" in capsys.readouterr().err


def test_a_process_ends_though_its_fetches_hang(tmp_path):
    link = Link(0)
    link.set("hangs")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        env={**os.environ, **link.environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "end\n" and done.returncode == 0, done.stderr
    # One request alone would hold it for 20 s.
    assert time.monotonic() - begun < 18


class Half(ObjectStore):
    """Its first range takes until the gate opens, the second fails at once."""

    gate = threading.Event()
    answered = threading.Event()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        if start:
            raise StorageError("the second range is gone")
        self.gate.wait(60)
        self.answered.set()
        return b"x" * (stop - start)


def test_a_fetch_that_fails_does_not_wait_for_what_hangs(tmp_path):
    store = Half(f"file://{tmp_path}")
    begun = time.monotonic()
    with pytest.raises(StorageError, match="the second range is gone"):
        store.fetch("text.bin", tmp_path / "copy", RANGE_BYTES + 1)
    assert time.monotonic() - begun < 30
    # What comes too late goes nowhere.
    store.gate.set()
    assert store.answered.wait(10)
    time.sleep(0.05)
    assert (tmp_path / "copy").read_bytes() == b""
