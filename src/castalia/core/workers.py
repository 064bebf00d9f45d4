"""Worker processes that are given their state once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


class WorkerPool(ProcessPoolExecutor):
    """`workers` processes of this machine, each of which calls `begin(state)` before its first task.

    They are spawned, because threads of torch and tokenizers do not survive a fork. The state goes through a queue:
    with it among the arguments, a process that dies before it has read them all would stop us for ever. They ignore
    SIGINT, which reaches every process of a terminal, for the first one says what it means; and end when it does.
    """

    def __init__(self, workers: int, begin: Callable[[Any], Any], state: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.states, self.began = spawn.Queue(), spawn.Event()
        self.states.cancel_join_thread()
        for _ in range(workers):
            self.states.put(state)
        super().__init__(workers, spawn, start, (begin, self.states, self.began))

    @property
    def why_none_began(self) -> str | None:
        """The sentence for the user if the pool broke before any of its processes ran a line of ours."""
        if self.began.is_set():
            return None
        return (
            "the worker processes ended as they started; what they said stands above. A script that is not run by"
            ' `castalia` must do its work under `if __name__ == "__main__":`, because each of them imports it'
        )


def start(begin: Callable[[Any], Any], states: Any, began: Any) -> None:
    """In a new process, before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began.set()
    end_with_parent()
    begin(states.get())


def end_with_parent() -> None:
    """In a worker: end when the process that started us has ended, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: Any) -> None:
    """On a thread of a worker."""
    parent.join()
    os._exit(1)
