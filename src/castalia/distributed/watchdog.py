"""A thread that detects a stalled run, names the stalled rank and ends the process.

The main thread says what it begins (`beat`). Several times within the limit, the thread of each
rank writes that, with the main thread's Python stack, into the store that the ranks joined by. A
rank without progress for longer than the limit reads the entries of all others over several ticks:

    silent   its entry does not change: the process is stopped, dead, or holds Python's lock
    waiting  its main thread is inside torch.distributed
    busy     neither waiting nor over its own limit: the others keep waiting for it
    hung     over its limit and not waiting

Silent ranks are at fault, else hung ones. A rank at fault prints the stacks of all its threads; the
others print which rank that is and the last stack it wrote. Then each process exits with status 1,
so that a launcher can restart the job.
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
from torch.distributed.distributed_c10d import _get_default_store

from castalia.core.errors import TrainingError
from castalia.distributed.world import World
from castalia.monitor.parts import part

DEFAULT_SECONDS = 600.0
"""Limit for several ranks when none is set; a single rank waits for nobody."""
FIRST = 4.0
"""The first step may take this many times the limit: it compiles blocks and opens connections."""
TICKS = 8
"""Ticks within the limit, unless that makes them longer than LONGEST_TICK seconds."""
LONGEST_TICK = 5.0
READINGS = 4
"""Ticks within which a living rank's entry must change."""
STDERR = 2
"""File descriptor for stacks; faulthandler prints them without the help of Python's objects."""
TORCH = f"{os.sep}torch{os.sep}"
WAITING = f"{TORCH}distributed{os.sep}"


class Watchdog:
    """Watches this rank from a thread of its own, inside a `with` block; the main thread only
    beats.

    seconds  limit without progress; 0 watches nothing; None is 600 for several ranks, 0 for one.
    """

    def __init__(self, world: World, seconds: float | None = None) -> None:
        self.rank = world.rank
        self.size = world.size
        if seconds is None:
            seconds = DEFAULT_SECONDS if world.size > 1 else 0.0
        self.seconds = seconds
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
        self.step = step
        self.what = what
        self.patience = patience
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
            with part(what):
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
                # A connection of this thread's own: the main thread may block on the shared one.
                shared: Any = _get_default_store()
                self.store = shared.clone()
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
        """Seconds that the main thread's current work may take."""
        first = FIRST if self.first_step in (None, self.step) else 1.0
        return self.seconds * max(first, self.patience)

    @property
    def is_late(self) -> bool:
        """Whether the current work has exceeded its limit."""
        return time.monotonic() - self.at > self.limit

    def watch(self) -> None:
        """The thread's loop."""
        last = time.monotonic()
        while not self.stopped.wait(self.tick):
            now = time.monotonic()
            if now - last > READINGS * self.tick:
                # The process was suspended and continues: not a stall of the run.
                self.at += now - last
            last = now
            if self.size > 1:
                # Ends the process even if the main thread never releases Python's lock.
                faulthandler.dump_traceback_later(
                    self.seconds + LONGEST_TICK, exit=True, file=STDERR
                )
            self.look()

    def look(self) -> None:
        """Write this rank's entry; when it is late, find the rank at fault."""
        try:
            self.write_entry()
            if not self.is_late:
                self.readings.clear()
                return
            self.readings.append([self.entry_of(rank) for rank in range(self.size)])
        except (RuntimeError, OSError):
            # An unreachable store matters only when this rank has something to ask.
            if self.is_late:
                self.end([self.rank], "and the store that the ranks joined by does not answer")
            return
        if len(self.readings) == READINGS or self.size == 1:
            if fault := at_fault(list(self.readings)):
                self.end(fault)
            self.readings.clear()

    def write_entry(self) -> None:
        """Write this rank's entry into the store."""
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

    def entry_of(self, rank: int) -> dict[str, Any] | None:
        """The entry of a rank; None before it has written one."""
        if self.store is None or rank == self.rank:
            return self.entry
        if not self.store.check([key(rank)]):
            return None
        entry: dict[str, Any] = json.loads(self.store.get(key(rank)))
        return entry

    def end(self, fault: list[int], remark: str = "") -> None:
        """Report the stalled ranks with their stacks, and end this process."""
        if self.rank in fault:
            remark = f", {remark}" if remark else ""
            say(f"rank {self.rank} hangs: {where(self.entry)}{remark}; its threads:")
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(STDERR, all_threads=True)
        else:
            for rank in fault:
                say(f"rank {self.rank} waits for rank {rank}, which hangs{self.last_seen(rank)}")
            # Time for the stalled rank to print its threads before a launcher kills the job.
            time.sleep(2 * self.tick)
        say(
            f"rank {self.rank} exits (guard.hang_seconds={self.seconds:g};"
            " raise it if the run was only slow)"
        )
        os._exit(TrainingError.exit_code)

    def last_seen(self, rank: int) -> str:
        """How long another rank has made no progress, and the last stack it wrote."""
        silent = " and is silent" if is_silent(list(self.readings), rank) else ""
        entry = self.readings[-1][rank]
        if entry is None:
            return f"{silent}: it never wrote an entry"
        return f"{silent}: {where(entry)}; the last stack it wrote:\n{entry['stack']}"


def at_fault(readings: list[list[dict[str, Any] | None]]) -> list[int]:
    """The stalled ranks, by the entries of all ranks over several ticks; [] while any is busy."""
    newest = readings[-1]
    ranks = range(len(newest))
    if silent := [rank for rank in ranks if is_silent(readings, rank)]:
        return silent
    moving = [entry for entry in newest if entry and not entry["waits"]]
    if any(not entry["late"] for entry in moving):
        return []
    hung = [rank for rank in ranks if not newest[rank]["waits"]]  # type: ignore[index]
    if hung:
        return hung
    # All wait in a collective: the ranks that are behind did not enter the one that the others are
    # in.
    steps = [entry["step"] for entry in newest if entry]
    return [rank for rank in ranks if steps[rank] == min(steps)]


def is_silent(readings: list[list[dict[str, Any] | None]], rank: int) -> bool:
    """Whether the entry of a rank has not changed."""
    first = readings[0][rank]
    last = readings[-1][rank]
    if last is None:
        return True
    return len(readings) > 1 and first is not None and first["tick"] == last["tick"]


def is_waiting(frame: FrameType | None) -> bool:
    """Whether the innermost Python frames of torch include one of torch.distributed."""
    while frame is not None and TORCH in frame.f_code.co_filename:
        if WAITING in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def where(entry: dict[str, Any]) -> str:
    """`no progress for 12.5 s in step 3 (reading data)`."""
    return f"no progress for {entry['seconds']:g} s in step {entry['step']} ({entry['what']})"


def key(rank: int) -> str:
    """The store's key of a rank's entry."""
    return f"watchdog/{rank}"


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"castalia: error: {text}\n")
    sys.stderr.flush()
