"""Processes end with the one that started them; commands of a user's do not."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from castalia.core import starter

CHILD = """
import os, signal, sys, time
from castalia.core import starter
if "poll" in sys.argv:
    del os.pidfd_open
    starter.end_by_kernel = lambda number: None
if "thread" in sys.argv:
    starter.end_by_kernel = lambda number: None
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
starter.end_with_starter()
assert starter.STARTER not in os.environ
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
mark, *words = sys.argv[1:]
env = os.environ | ({mark: str(os.getpid())} if mark else {})
subprocess.Popen([sys.executable, "-c", os.environ["CHILD"], *words], env=env)
time.sleep(60)
"""


def after_the_kill(mark: str, *words: str) -> tuple[str, psutil.Process]:
    """What the child of a killed process prints until its end, and the child."""
    environment = os.environ | {"CHILD": CHILD}
    command = [sys.executable, "-c", PARENT, mark, *words]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        if not mark:
            return "", child
        # Ends with the child, which has the other end of the pipe.
        return parent.stdout.read(), child


@pytest.mark.parametrize("way", ["kernel", "thread", "poll"])
def test_a_rank_ends_at_once_and_another_process_saves(way):
    said, _ = after_the_kill("TORCHELASTIC_RUN_ID", way)
    assert "saved" not in said
    if way != "kernel":
        assert said.startswith("castalia: process ") and "so does this one" in said
    said, _ = after_the_kill(starter.STARTER, way)
    assert "saved" in said


def test_a_command_of_a_users_outlives_its_shell():
    _, child = after_the_kill("")
    time.sleep(0.2)
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    child.kill()


def test_a_starter_that_ended_before_is_noticed():
    with subprocess.Popen(["true"]) as ended:
        pass
    environment = os.environ | {starter.STARTER: str(ended.pid)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=200
    )
    assert f"process {ended.pid}, which started this one, has ended" in done.stderr


def test_waiting_by_polling(monkeypatch):
    monkeypatch.setattr(starter, "POLL_SECONDS", 0.01)
    with subprocess.Popen(["sleep", "0.2"]) as process:
        assert starter.exists(process.pid)
        process.wait()
        starter.wait_by_polling(process.pid)
    assert starter.exists(1)
