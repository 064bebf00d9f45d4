"""Batches, read ahead in a thread or in processes; the same for any number of either."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace

import torch

from castalia.core.errors import DataError
from castalia.core.workers import WorkerPool
from castalia.data.batch import IGNORED, Batch
from castalia.data.rows_by_source import RowPlaces, RowsBySource
from castalia.data.run_rows import BlendedRows
from castalia.data.segments import DocumentMask, places_within
from castalia.data.step_reader import (
    PADDING,
    MicroRows,
    StepReader,
    check_batch,
    read_in_worker,
    start_worker,
)

AHEAD = 1
"""Steps that wait, read, while the next one is being read."""
Steps = Generator[list[MicroRows], None, None]
Task = tuple[int, Sequence[RowPlaces] | None]
"""A step, and the rows of this rank's micro-batches where a plan says which."""
RowLookup = Callable[[int, int], RowPlaces]
"""Rows of the places from the first number to the second of one step's batch."""


class StepLoader:
    """Iterating gives, for step start_step, start_step + 1, … without end, this rank's micro-batches of the step.

    Step t uses places [t·B, (t+1)·B) of `rows`, B = batch_size; see `StepReader` for the share of a rank.
    `micro_batch_size` None is the rank's whole share B / world. `uneven` takes a batch that does not divide, in shares
    that differ by one row at most.

    `plans` gives, step by step, which rows of `RowsBySource` the batch is made of, or None while the next step may not
    be planned yet: it is asked again when a step is taken. Where it ends, the loader ends.

    `vocab_size` checks every id. `eod_id` leaves out of the loss the target after each end-of-document token in the
    row (GPT-NeoX's eod_mask_loss). `mask` gives every document of a row segments and positions of its own, and leaves
    out of the loss the target that is the next document's first token. `workers` 0 reads ahead in a thread; more are
    processes, each with its own copy of the order's index. The batches are the same for any number.

    Raises  ConfigError if batch_size does not divide and is not `uneven`; DataError, where the batch is taken, for an
            id that is not in the vocabulary.
    """

    def __init__(
        self,
        rows: BlendedRows | RowsBySource,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        dp_rank: int = 0,
        dp_world: int = 1,
        start_step: int = 0,
        vocab_size: int | None = None,
        eod_id: int | None = None,
        workers: int = 0,
        plans: Iterator[RowLookup | None] | None = None,
        uneven: bool = False,
        mask: DocumentMask | None = None,
    ) -> None:
        micro = micro_batch_size or -(-batch_size // dp_world)
        if not uneven:
            check_batch(batch_size, micro_batch_size or max(batch_size // dp_world, 1), dp_world)
        assert 0 <= dp_rank < dp_world, (dp_rank, dp_world)
        self.reader = StepReader(
            rows, batch_size, micro, dp_rank, dp_world, vocab_size, mask
        ).start()
        self.start_step, self.eod_id, self.workers, self.plans = start_step, eod_id, workers, plans

    @property
    def micro_steps(self) -> int:
        """Micro-batches that this rank takes in one step."""
        return self.reader.micro_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        if self.workers:
            steps = read_in_processes(self.reader, self.tasks(), self.workers)
        elif self.plans is not None:
            steps = in_order(
                ThreadPoolExecutor(1, "data"), self.reader.read, self.tasks(), 1 + AHEAD
            )
        else:
            steps = read_in_thread(self.reader, self.start_step)
        with closing(steps):
            for step in steps:
                yield [as_batch(found, self.eod_id) for found in step]

    def tasks(self) -> Iterator[Task | None]:
        """What is to be read, in order; None where the next step is not planned yet."""
        if self.plans is None:
            yield from ((step, None) for step in itertools.count(self.start_step))
            return
        step, shares = self.start_step, self.reader.shares
        for plan in self.plans:
            yield (
                None
                if plan is None
                else (step, [plan(share.start, share.stop) for share in shares])
            )
            step += plan is not None


def as_batch(found: MicroRows, eod_id: int | None) -> Batch:
    """Rows as tokens and the labels that follow them; no label after `eod_id`."""
    rows = torch.from_numpy(found.rows)
    tokens, labels = (
        rows[:, :-1].contiguous(),
        rows[:, 1:].clone(),
    )  # of a single row, both could be one memory
    if found.labels is not None:
        labels = torch.from_numpy(found.labels[:, 1:].copy())
    if eod_id is not None:
        labels[tokens == eod_id] = IGNORED
    labels[torch.from_numpy(found.index) == PADDING] = IGNORED
    if found.filled is not None:
        labels[torch.arange(1, rows.shape[1]) >= torch.from_numpy(found.filled)[:, None]] = IGNORED
    batch = Batch(tokens, labels, torch.from_numpy(found.source), torch.from_numpy(found.index))
    if found.segments is None:
        return batch
    own = found.segments[:, :-1]
    labels[torch.from_numpy(found.segments[:, 1:] != own)] = IGNORED
    segments, positions = torch.from_numpy(own).contiguous(), torch.from_numpy(places_within(own))
    return replace(batch, segments=segments, positions=positions)


def read_in_processes(reader: StepReader, tasks: Iterator[Task | None], workers: int) -> Steps:
    """Steps in the order of `tasks`, each read by one of `workers` processes; closing the iterator ends them."""
    pool = WorkerPool(workers, start_worker, reader)
    try:
        yield from in_order(pool, read_in_worker, tasks, workers + AHEAD)
    except BrokenProcessPool as error:
        why = (
            pool.why_none_began
            or f"a process that reads data ended ({error}); set data.workers lower, or 0"
        )
        raise DataError(why) from error


def in_order(
    pool: Executor, read: Callable[..., list[MicroRows]], tasks: Iterator[Task | None], most: int
) -> Steps:
    """What `read` makes of each task, up to `most` of them under way; ends with `tasks`, and then ends the pool."""
    waiting: deque[Future[list[MicroRows]]] = deque()
    try:
        while True:
            while len(waiting) < most and (task := next(tasks, None)) is not None:
                waiting.append(pool.submit(read, *task))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_in_thread(reader: StepReader, start: int) -> Steps:
    """Steps from `start` on, read ahead in a thread; closing the iterator ends it."""
    ready: queue.Queue[list[MicroRows] | BaseException] = queue.Queue(maxsize=AHEAD)
    stopped = threading.Event()
    thread = threading.Thread(
        target=fill, args=(reader, start, ready, stopped), daemon=True, name="data"
    )
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def fill(reader: StepReader, start: int, ready: queue.Queue, stopped: threading.Event) -> None:
    """The thread: fill `ready` until `stopped`; an error is handed over in place of a step."""
    for step in itertools.count(start):
        try:
            item: list[MicroRows] | BaseException = reader.read(step)
        except BaseException as error:
            item = error
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        if stopped.is_set() or isinstance(item, BaseException):
            return
