"""One piece of heavy work at a time, in a thread, with its progress and a way to cancel it."""

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from castalia.core.errors import CastaliaError

NICENESS = 10
"""Of the thread: a run that trains on this machine goes first."""

Work = Callable[[], tuple[int, Iterator[dict[str, Any]]]]
"""Prepares a job; gives the number of results to come, and the results one by one."""


class BusyError(CastaliaError):
    """Another job runs."""


class Job:
    """One job: its state and what it has found so far."""

    def __init__(self, number: int, about: dict[str, Any], work: Work) -> None:
        self.number = number
        self.about = about
        self.work = work
        self.state = "preparing"
        """preparing, running, done, cancelled or failed."""
        self.total = 0
        self.results: list[dict[str, Any]] = []
        self.error = ""
        self.cancelled = threading.Event()
        # A daemon: a server that ends does not wait for a model.
        self.thread = threading.Thread(target=self.run, name=f"job {number}", daemon=True)

    @property
    def runs(self) -> bool:
        """Whether it is not finished."""
        return self.state in ("preparing", "running")

    def run(self) -> None:
        """Do the work; nothing is raised."""
        give_way()
        try:
            self.total, results = self.work()
            self.state = "running"
            for result in results:
                if self.cancelled.is_set():
                    break
                self.results.append(result)
            self.state = "cancelled" if self.cancelled.is_set() else "done"
        except CastaliaError as error:
            self.fail(str(error))
        except Exception as error:
            # Also out of memory: whoever waits must see that it has ended.
            traceback.print_exc()
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, text: str) -> None:
        """End with an error."""
        self.error = text
        self.state = "failed"

    def report(self, first: int = 0) -> dict[str, Any]:
        """State, progress, and the results from number `first` on, as JSON values."""
        results = self.results[first:]
        return {
            "job": self.number,
            "about": self.about,
            "state": self.state,
            "total": self.total,
            "done": len(self.results),
            "first": first,
            "results": results,
            "error": self.error,
        }


class Jobs:
    """At most one job at a time; the last one is remembered."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.job: Job | None = None
        self.count = 0

    def start(self, about: dict[str, Any], work: Work) -> Job:
        """Start a job.

        Raises  BusyError while another one runs.
        """
        with self.lock:
            if self.job is not None and self.job.runs:
                done = f"{len(self.job.results)} of {self.job.total} rows"
                raise BusyError(f"another job runs ({done}); cancel it or wait")
            self.count += 1
            self.job = Job(self.count, about, work)
            self.job.thread.start()
            return self.job

    def cancel(self) -> None:
        """Ask the job to end; it does after the batch that it computes."""
        if self.job is not None:
            self.job.cancelled.set()

    def report(self, first: int = 0) -> dict[str, Any]:
        """The newest job's report; {"job": 0} before the first one."""
        if self.job is None:
            return {"job": 0, "state": "none"}
        return self.job.report(first)


def give_way() -> None:
    """Give this thread a lower priority, where the system has one for threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
