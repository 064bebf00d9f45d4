"""A pool of worker processes, each of which receives its state once, at its start."""

import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Event
from typing import Any, Generic, TypeVar

from castalia.core.background import leave_behind

S = TypeVar("S")
R = TypeVar("R")


REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a job to end."""


class Worker(SpawnProcess):
    """A worker process."""

    def terminate(self) -> None:
        """End it: a broken pool ends its workers, and they ignore SIGTERM."""
        self.kill()


class Spawning(SpawnContext):
    """Makes workers."""

    Process = Worker


class WorkerPool(ProcessPoolExecutor):
    """`workers` local processes, each of which calls `begin(state)` before its first task.

    Workers ignore the signals that ask a job to end: a Ctrl-C reaches every process of the
    terminal, and a scheduler's SIGTERM every process of the job, but only the parent decides what
    they mean. Workers exit when the parent does, even if it is killed.
    With `patience`, the end of the pool waits so many seconds for what is running, and kills the
    workers then.
    Raises  the error of pickling `state`, if it cannot be pickled.
    """

    def __init__(
        self,
        workers: int,
        begin: Callable[[S], object],
        state: S,
        *,
        patience: float | None = None,
    ) -> None:
        self.patience = patience
        # Spawned, not forked: the threads of torch and tokenizers do not survive a fork.
        spawn = Spawning()
        self.began = spawn.Event()
        forget_standard_input()
        super().__init__(workers, spawn, partial(start, begin, InheritedState(state), self.began))

    @property
    def why_none_began(self) -> str | None:
        """The sentence for the user if every worker ended before our first line; None otherwise."""
        if self.began.is_set():
            return None
        return (
            "the worker processes ended while starting; their own output is above. Each of them"
            " imports the main script, so a script not run by `castalia` must do its work under"
            ' `if __name__ == "__main__":`'
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of every executor; see `patience`."""
        if self.patience is None or not wait:
            super().shutdown(wait, cancel_futures=cancel_futures)
            return
        timer = threading.Timer(self.patience, self.give_up)
        timer.daemon = True
        timer.start()
        try:
            super().shutdown(cancel_futures=cancel_futures)
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """Kill the workers, and say so."""
        self.kill()
        leave_behind("a worker process")

    def kill(self) -> None:
        """End the workers at once, whatever they do: on a request to stop nobody waits longer."""
        # The other children of this process are not ours.
        for process in list((self._processes or {}).values()):
            process.kill()


def forget_standard_input() -> None:
    """Let a script read from standard input start workers.

    Its `__file__` is `<stdin>`, which a spawned process would try, and fail, to import.
    """
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) == "<stdin>":
        del main.__file__


def in_order(
    pool: Executor,
    work: Callable[..., R],
    tasks: Iterator[tuple[Any, ...] | None],
    most: int,
) -> Generator[R, None, None]:
    """The results of `work` for the arguments in each task, in order, with up to `most` tasks in
    progress.

    It ends with `tasks`, and shuts the pool down then.
    """
    waiting: deque[Future[R]] = deque()
    try:
        while True:
            # A task of None means that the next one needs the results of this one: stop asking.
            while len(waiting) < most and (task := next(tasks, None)) is not None:
                waiting.append(pool.submit(work, *task))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class InheritedState(Generic[S]):
    """An object pickled into an unnamed file, whose descriptor each worker inherits.

    As an argument of the process it would pass through a pipe of which the parent holds both ends.
    If the worker dies before reading all of it, as in a script without the `__main__` guard, the
    parent would block in its write forever.
    """

    def __init__(self, value: S) -> None:
        self.file = open_unnamed()
        pickle.dump(value, self.file, pickle.HIGHEST_PROTOCOL)
        self.file.flush()

    def __getstate__(self) -> Any:
        return DupFd(self.file.fileno())

    def __setstate__(self, descriptor: Any) -> None:
        self.file = open(descriptor.detach(), "rb")  # noqa: SIM115

    def read(self) -> S:
        """In a worker: unpickle the object. It can be read once."""
        # Mapped, not read: all workers share the pages of the parent's file.
        with self.file, mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ) as content:
            value: S = pickle.loads(content)
        return value


def open_unnamed() -> Any:
    """A writable file without a name: in memory on Linux, else in the temporary folder."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("state"), "wb")
    return tempfile.TemporaryFile()


def start(begin: Callable[[S], object], state: InheritedState[S], began: Event) -> None:
    """In a worker, before its first task."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    began.set()
    # Before the state, which may take long to load: the parent may die in the meantime.
    end_with_parent()
    begin(state.read())


def end_with_parent() -> None:
    """In a worker: exit as soon as the parent process has ended, for whatever reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with_pipe(int(parent.sentinel))
        threading.Thread(target=exit_after, args=(parent,), daemon=True).start()


def end_with_pipe(descriptor: int) -> None:
    """Let the kernel kill this process when the other end of a pipe is closed, as it is when the
    parent ends.

    The watching thread needs Python's lock, which a call into a library may keep for long. Linux
    alone does this; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    import fcntl

    # What stands in for Linux in a sandbox may not know F_SETSIG: the thread watches there, too.
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)


def exit_after(parent: BaseProcess) -> None:
    """The watching thread of a worker."""
    parent.join()
    os._exit(1)
