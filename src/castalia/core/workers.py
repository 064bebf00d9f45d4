"""Worker processes that are given their state once."""

import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.reduction import DupFd
from typing import Any


class WorkerPool(ProcessPoolExecutor):
    """`workers` processes of this machine, each of which calls `begin(state)` before its first task.

    They are spawned, because threads of torch and tokenizers do not survive a fork. They ignore SIGINT, which reaches
    every process of a terminal, for the first one says what it means; and end when it does.
    Raises  what pickling the state raises.
    """

    def __init__(self, workers: int, begin: Callable[[Any], Any], state: Any) -> None:
        held, spawn = State(state), multiprocessing.get_context("spawn")
        self.began = spawn.Event()
        forget_standard_input()
        super().__init__(workers, spawn, partial(start, begin, held, self.began))

    @property
    def why_none_began(self) -> str | None:
        """The sentence for the user if the pool broke before any of its processes ran a line of ours."""
        if self.began.is_set():
            return None
        return (
            "the worker processes ended as they started; what they said stands above. A script that is not run by"
            ' `castalia` must do its work under `if __name__ == "__main__":`, because each of them imports it'
        )


def forget_standard_input() -> None:
    """A script that is read from standard input says that its file is `<stdin>`, which no new process can import."""
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) == "<stdin>":
        del main.__file__


class State:
    """An object, pickled in a file without a name, of which each new process inherits the descriptor.

    Among the arguments of a process it would go through a pipe whose both ends we hold: one that dies before it has
    read all, as a script without a guard does, would leave us writing for ever.
    """

    def __init__(self, value: Any) -> None:
        memory = hasattr(os, "memfd_create")
        self.file: Any = (
            open(os.memfd_create("state"), "wb") if memory else tempfile.TemporaryFile()  # noqa: SIM115
        )
        pickle.dump(value, self.file, pickle.HIGHEST_PROTOCOL)
        self.file.flush()

    def __getstate__(self) -> Any:
        return DupFd(self.file.fileno())

    def __setstate__(self, descriptor: Any) -> None:
        self.file = open(descriptor.detach(), "rb")  # noqa: SIM115

    def read(self) -> Any:
        """In a new process: the object, once."""
        with self.file, mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ) as content:
            return pickle.loads(content)


def start(begin: Callable[[Any], Any], state: State, began: Any) -> None:
    """In a new process, before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began.set()
    end_with_parent()
    begin(state.read())


def end_with_parent() -> None:
    """In a worker: end when the process that started us has ended, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: Any) -> None:
    """On a thread of a worker."""
    parent.join()
    os._exit(1)
