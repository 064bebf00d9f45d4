"""`Background`: functions in daemon threads, which never hold the end of the process."""

import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")
IDLE_SECONDS = 10.0
"""Time after which a thread without work ends."""
PATIENCE = 10.0
"""Seconds that the end of a run waits for what is still being read."""


class Background(Executor):
    """Up to `threads` threads that run functions in the order of `submit`.

    The threads of a `ThreadPoolExecutor` are joined at the end of the process. One that waits for a
    server that hangs, with its repeats, would hold it for minutes.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self.name = name
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin without a thread."""
        self.process = os.getpid()
        self.waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.started = 0
        self.idle = 0
        """Threads that are free, less functions that no thread has taken yet."""
        self.running: set[Future[Any]] = set()

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """The result of `work` to come."""
        future: Future[T] = Future()
        with self.lock:
            if self.process != os.getpid():
                # A fork: the threads stayed in the parent.
                self.reset()
            self.waiting.put((future, lambda: work(*arguments, **named)))
            self.idle -= 1
            if self.idle < 0 and self.started < self.threads:
                self.started += 1
                self.idle += 1
                name = f"{self.name}-{self.started}"
                threading.Thread(target=self.run, daemon=True, name=name).start()
        return future

    def run(self) -> None:
        """One thread."""
        while True:
            try:
                future, work = self.waiting.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                if self.may_end():
                    return
                continue
            if future.set_running_or_notify_cancel():
                self.running.add(future)
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
                self.running.discard(future)
            # Else the thread would keep the last result while it waits.
            del future, work
            with self.lock:
                self.idle += 1

    def may_end(self) -> bool:
        """Whether there is no work for a thread, which then counts no more."""
        with self.lock:
            if not self.waiting.empty():
                return False
            self.started -= 1
            self.idle -= 1
            return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for what is running, at most `PATIENCE` seconds; then say that it is left behind."""
        while cancel_futures:
            try:
                future, _ = self.waiting.get_nowait()
            except queue.Empty:
                break
            future.cancel()
            with self.lock:
                self.idle += 1
        if wait and futures.wait(self.running.copy(), PATIENCE).not_done:
            leave_behind(self.name)


def leave_behind(what: str) -> None:
    """Say that the end does not wait for something any longer."""
    print(
        f"castalia: {what} did not end within {PATIENCE:g} s, perhaps because a server hangs;"
        " it is left behind, and nothing is lost",
        file=sys.stderr,
        flush=True,
    )
