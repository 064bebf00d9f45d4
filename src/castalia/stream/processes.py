"""Work shared among processes that have what it is on in common; the results come in order."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from castalia.core.errors import DataError
from castalia.core.workers import WorkerPool, in_order

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2
"""Tasks in progress beyond one for each process, so that none waits for the results to be used."""
STATE: list[tuple[Any, Callable[[Any, Any], Any]]] = []
"""The state and the work of this process, set once when it starts."""


def in_processes(
    state: State, work: Callable[[State, Task], Result], tasks: Iterable[Task], workers: int = 0
) -> Generator[Result, None, None]:
    """work(state, task) for each task, in order, by so many processes; 0 is this one.

    `state`, often a stream, is pickled once for each process, work, tasks and results as well: let
    `work` be a function of a module, or a partial of one, and let it return what it found, not the
    rows. With several processes a mixed run is planned in each of them. Closing the iterator ends
    the processes, without the tasks that they have not begun.
    Raises  what `work` does; DataError if a process dies.
    """
    if not workers:
        for task in tasks:
            yield work(state, task)
        return
    # In order, though a slow task then holds up its followers: files and lines are written as they
    # come, and a stopped job goes on behind the last one.
    pool = WorkerPool(workers, begin, (state, work))
    try:
        yield from in_order(pool, do, ((task,) for task in tasks), workers + AHEAD)
    except BrokenProcessPool as error:
        reason = (
            f"a worker process died ({error}), most likely out of memory; use fewer with --workers"
        )
        raise DataError(pool.why_none_began or reason) from error


def begin(state: tuple[Any, Callable[[Any, Any], Any]]) -> None:
    """In a worker: keep state and work, so that each task carries itself only."""
    STATE[:] = [state]


def do(task: Any) -> Any:
    """In a worker: one task."""
    state, work = STATE[0]
    return work(state, task)
