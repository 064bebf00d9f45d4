"""A thread that sees whether its process goes on; when the run stands still it names who hangs, and ends the process.

The main thread says what it begins (`beat`). The thread of each process puts that, with the main thread's Python stack,
into the store that the processes met by, a few times within the limit. A process without progress for longer than
the limit reads what all others put there, over some ticks:

    silent   its entry does not change: the process is stopped, dead, or holds Python's lock
    waiting  its main thread is inside torch.distributed
    busy     neither waiting nor over its own limit: the others go on waiting for it
    hung     over its limit and not waiting

The silent ones are at fault, or else the hung ones. A process at fault prints the stacks of all its threads; the others
print who it is and the stack that it told last. Then each ends with status 1, so that a launcher can start them again.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from castalia.core.errors import TrainingError
from castalia.distributed.world import World

DEFAULT_SECONDS = 600.0
"""Limit among several processes when none is set; alone, a process waits for nobody."""
FIRST = 4.0
"""The first step may take so many times the limit: blocks are compiled and connections made."""
TICKS = 8
"""Ticks within the limit, if that makes them shorter than LONGEST_TICK seconds."""
LONGEST_TICK = 5.0
READINGS = 4
"""Ticks over which an entry must change to be a living one."""
STDERR = 2
"""File descriptor for the stacks, which are printed without Python's help."""
TORCH, WAITING = f"{os.sep}torch{os.sep}", f"{os.sep}torch{os.sep}distributed{os.sep}"


class Watchdog:
    """Watches one process from its own thread, between entering and leaving; costs the main thread nothing but `beat`.

    seconds  limit without progress; 0 watches nothing; None is 600 among several processes and 0 alone.
    """

    def __init__(self, world: World, seconds: float | None = None) -> None:
        self.rank, self.size = world.rank, world.size
        self.seconds = (DEFAULT_SECONDS if world.size > 1 else 0.0) if seconds is None else seconds
        self.tick = min(LONGEST_TICK, self.seconds / TICKS)
        self.first_step: int | None = None
        self.ticks = 0
        self.readings: deque[list[dict[str, Any] | None]] = deque(maxlen=READINGS)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="watchdog")
        self.store: dist.Store | None = None
        self.beat(0, "start")

    def beat(self, step: int, what: str, patience: float = 1.0) -> None:
        """The main thread begins `what` of `step`, which may take `patience` times the limit."""
        self.step, self.what, self.patience = step, what, patience
        self.at = time.monotonic()

    def step_begins(self, step: int) -> None:
        """As `beat`; the first step that begins may take longer."""
        self.first_step = step if self.first_step is None else self.first_step
        self.beat(step, "reading data")

    @contextmanager
    def doing(self, what: str, patience: float = 1.0) -> Iterator[None]:
        """The main thread does `what` in this block, which may take `patience` times the limit.

        The limit starts again at both ends of the block.
        """
        outer = (self.what, self.patience)
        self.beat(self.step, what, patience)
        try:
            yield
        finally:
            self.beat(self.step, *outer)

    def progressed(self) -> None:
        """The main thread has come further in the same work: the limit starts again."""
        self.at = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.main = threading.main_thread().ident
            if self.size > 1:
                # a connection of this thread's own
                self.store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
                self.store.set_timeout(timedelta(seconds=max(10.0, self.tick)))
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    @property
    def limit(self) -> float:
        """Seconds that what the main thread does may take."""
        first = FIRST if self.first_step in (None, self.step) else 1.0
        return self.seconds * max(first, self.patience)

    @property
    def is_late(self) -> bool:
        """Whether the limit is over."""
        return time.monotonic() - self.at > self.limit

    def watch(self) -> None:
        """The thread."""
        last = time.monotonic()
        while not self.stopped.wait(self.tick):
            now = time.monotonic()
            if now - last > READINGS * self.tick:
                self.at += now - last  # this process was stopped and goes on: it was not its fault
            last = now
            if (
                self.size > 1
            ):  # ends the process even if the main thread holds Python's lock for ever
                faulthandler.dump_traceback_later(
                    self.seconds + LONGEST_TICK, exit=True, file=STDERR
                )
            self.look()

    def look(self) -> None:
        """Tell where this process is; when it is late, find out who is to blame."""
        try:
            self.tell()
            if not self.is_late:
                self.readings.clear()
                return
            self.readings.append([self.told_by(rank) for rank in range(self.size)])
        except (
            RuntimeError,
            OSError,
        ):  # the store does not answer; that matters when there is something to ask
            if self.is_late:
                self.end([self.rank], "and the store that the processes met by does not answer")
            return
        if len(self.readings) == READINGS or self.size == 1:
            if fault := at_fault(list(self.readings)):
                self.end(fault)
            self.readings.clear()

    def tell(self) -> None:
        """Put this process's entry into the store."""
        self.ticks += 1
        frame = sys._current_frames().get(self.main or 0)
        self.entry = {
            "tick": self.ticks,
            "step": self.step,
            "what": self.what,
            "seconds": round(time.monotonic() - self.at, 1),
            "late": self.is_late,
            "waits": is_waiting(frame),
            "stack": "".join(traceback.format_stack(frame)[-12:]) if frame else "",
        }
        if self.store:
            self.store.set(key(self.rank), json.dumps(self.entry))

    def told_by(self, rank: int) -> dict[str, Any] | None:
        """The entry of a process; None if it has none."""
        if self.store is None or rank == self.rank:
            return self.entry
        return json.loads(self.store.get(key(rank))) if self.store.check([key(rank)]) else None

    def end(self, fault: list[int], remark: str = "") -> None:
        """Say who hangs, with the stack, and end this process."""
        if self.rank in fault:
            remark = f", {remark}" if remark else ""
            say(f"rank {self.rank} hangs: {where(self.entry)}{remark}; its threads:")
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(STDERR, all_threads=True)
        else:
            for rank in fault:
                entry = self.readings[-1][rank]
                stack = f"; its stack, as it told last:\n{entry['stack']}" if entry else ""
                where_it_is = where(entry) if entry else "it never told where it is"
                silent = " and is silent" if is_silent(list(self.readings), rank) else ""
                say(
                    f"rank {self.rank} waits for rank {rank}, which hangs{silent}: {where_it_is}{stack}"
                )
            time.sleep(2 * self.tick)  # time for that one to print its threads
        say(
            f"rank {self.rank} ends (guard.hang_seconds={self.seconds:g}; set it higher if this was only slow)"
        )
        os._exit(TrainingError.exit_code)


def at_fault(readings: list[list[dict[str, Any] | None]]) -> list[int]:
    """The ranks that hang by what each rank told over some ticks; none while one of them is busy."""
    newest, ranks = readings[-1], range(len(readings[-1]))
    if silent := [rank for rank in ranks if is_silent(readings, rank)]:
        return silent
    moving = [entry for entry in newest if entry and not entry["waits"]]
    if any(not entry["late"] for entry in moving):
        return []
    hung = [rank for rank in ranks if not newest[rank]["waits"]]  # type: ignore[index]
    if hung:
        return hung
    steps = [entry["step"] for entry in newest if entry]
    return [rank for rank in ranks if steps[rank] == min(steps)]


def is_silent(readings: list[list[dict[str, Any] | None]], rank: int) -> bool:
    """Whether the entry of a rank did not change."""
    first, last = readings[0][rank], readings[-1][rank]
    return last is None or (
        len(readings) > 1 and first is not None and first["tick"] == last["tick"]
    )


def is_waiting(frame: FrameType | None) -> bool:
    """Whether the innermost Python frames, as far as they are torch's, are inside torch.distributed."""
    while frame is not None and TORCH in frame.f_code.co_filename:
        if WAITING in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def where(entry: dict[str, Any]) -> str:
    """`no progress for 12.5 s in step 3 (reading data)`."""
    return f"no progress for {entry['seconds']:g} s in step {entry['step']} ({entry['what']})"


def key(rank: int) -> str:
    """Where a rank's entry lies in the store."""
    return f"watchdog/{rank}"


def say(text: str) -> None:
    """A line on stderr."""
    print(f"castalia: error: {text}", file=sys.stderr, flush=True)
