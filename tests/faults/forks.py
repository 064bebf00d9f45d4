"""Forks of one warm process, for the campaigns of this folder: an attempt costs no import."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.fixtures.forked_rank import join_ranks
from tests.fixtures.ports import held_port

LOG = "log.txt"
"""What the ranks of an attempt print, in its folder."""


def start(folder: Path, work: Callable[[], NoReturn], processes: int = 1) -> list[int]:
    """Fork all ranks of one attempt, in a process group of their own; their process ids."""
    group = 0
    ranks: list[int] = []
    with held_port() as port:
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                try:
                    os.setpgid(0, group)
                    os.chdir(folder)
                    output = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    if processes > 1:
                        join_ranks(rank, processes, port)
                    work()
                finally:
                    # An error must not unwind the campaign in its fork.
                    os._exit(98)
            # Both sides set it, so that neither needs the other to be first.
            group = group or child
            os.setpgid(child, group)
            ranks.append(child)
    return ranks


def wait_for_all(ranks: list[int], end: float = float("inf")) -> list[int]:
    """Wait until all ranks have ended or `end` has come; the exit statuses of those that ended.

    Takes   ranks: those that have ended are removed.
    """
    codes: list[int] = []
    while ranks:
        for rank in list(ranks):
            done, status = os.waitpid(rank, os.WNOHANG)
            if done:
                ranks.remove(rank)
                codes.append(os.waitstatus_to_exitcode(status))
        if time.monotonic() > end:
            break
        time.sleep(0.001)
    return codes


def end_all(ranks: list[int]) -> None:
    """Kill what is left of an attempt."""
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    ranks.clear()


def group_lives(group: int) -> bool:
    """Whether any process of a group is alive."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def in_a_child(question: Callable[[], Any]) -> Any:
    """Answer a question in a fork, so that its threads do not stay in this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as file:
                file.write(json.dumps(question()))
        except BaseException:
            traceback.print_exc()
        finally:
            # Without the interpreter's shutdown, which would belong to the parent.
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)
