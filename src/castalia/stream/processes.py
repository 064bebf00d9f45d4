"""Work on the rows of a stream, shared among processes; the results come in order."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from castalia.core.errors import DataError
from castalia.core.workers import WorkerPool, in_order
from castalia.stream.opening import Stream

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Stream, Task], Result]

AHEAD = 2
"""Tasks in progress beyond one for each process, so that none waits for the results to be used."""
STATE: list[tuple[Stream, Work[Any, Any]]] = []
"""The stream and the work of this process, set once when it starts."""


def over_stream(
    stream: Stream, work: Work[Task, Result], tasks: Iterable[Task], workers: int = 0
) -> Generator[Result, None, None]:
    """work(stream, task) for each task, in order, by so many processes; 0 is this one.

    Stream, work, tasks and results are pickled: let `work` be a function of a module, or a partial
    of one, and let it return what it found, not the rows. With several processes a mixed run is
    planned in each of them. Closing the iterator ends the processes.
    Raises  what `work` does; DataError if a process dies.
    """
    if not workers:
        for task in tasks:
            yield work(stream, task)
        return
    pool = WorkerPool(workers, begin, (stream, work))
    try:
        yield from in_order(pool, do, ((task,) for task in tasks), workers + AHEAD)
    except BrokenProcessPool as error:
        reason = f"a worker process died ({error}); use fewer with --workers, or none with 0"
        raise DataError(pool.why_none_began or reason) from error


def begin(state: tuple[Stream, Work[Any, Any]]) -> None:
    """In a worker: keep stream and work, so that each task carries itself only."""
    STATE[:] = [state]


def do(task: Any) -> Any:
    """In a worker: one task."""
    stream, work = STATE[0]
    return work(stream, task)
