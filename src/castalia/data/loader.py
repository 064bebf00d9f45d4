"""Batches of the steps, read ahead in a thread or in worker processes. Their number does not change
a batch."""

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace

import torch

from castalia.core.background import PATIENCE, Background, leave_behind
from castalia.core.errors import DataError
from castalia.core.workers import WorkerPool, in_order
from castalia.data.batch import Batch
from castalia.data.batch_sizes import BatchSizes, Ramp
from castalia.data.labels import IGNORED
from castalia.data.row_source import RowPlaces
from castalia.data.segments import DocumentMask, positions_within
from castalia.data.served import ServedRows
from castalia.data.step_reader import (
    PADDING_ROW,
    MicroRows,
    StepReader,
    check_batch,
    read_in_worker,
    start_worker,
)

AHEAD = 1
"""Steps that are ready and waiting while the next one is being read."""
POLL_SECONDS = 0.05
"""How often the reading thread checks whether it must stop, while the queue is full."""
Steps = Generator[list[MicroRows], None, None]
ReadTask = tuple[int, Sequence[RowPlaces] | None]
"""A step and, if a plan chooses them, the rows of each of this rank's micro-batches."""
RowLookup = Callable[[int, int], RowPlaces]
"""The plan of one step: the rows at places [first, second) of its batch."""


class StepLoader:
    """Iterate over the steps from start_step on, without end: lists of this rank's micro-batches.

    Step t uses places [t·B, (t+1)·B) of `rows`, B = batch_size; `StepReader` defines the share of a
    rank.

    Of pairs, a place is a pair, which makes two rows of a batch.

    micro_batch_size  rows; None means the rank's whole share B / world.
    uneven            accepts a batch that is not divisible, in shares that differ by at most one
                      row.
    plans             step by step, which rows of `RowsBySource` make up the batch, or None while
                      the next step cannot be planned yet: it is asked again when a step is taken.
                      The loader ends where `plans` ends.
    vocab_size        checks every id.
    eod_id            excludes the target after each end-of-document token of a row, GPT-NeoX's
                      eod_mask_loss.
    mask              gives every document of a row its own segments and positions, and excludes the
                      target that is the next document's first token.
    ramp              smaller batches in the first steps; see `BatchSizes`.
    prompt_weight     what tokens that label files leave out count as targets, 0 by default.
    workers           0 reads ahead in a thread; more are processes, each with its own copy of the
                      order's index. The batches are the same for any number.

    Raises  ConfigError if batch_size is not divisible and not `uneven`; DataError, when the batch
            is taken, for an id outside the vocabulary.
    """

    def __init__(
        self,
        rows: ServedRows,
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
        ramp: Ramp | None = None,
        prompt_weight: float = 0.0,
    ) -> None:
        for size in BatchSizes(batch_size, ramp).distinct():
            if not uneven:
                check_batch(size, micro_batch_size or max(size // dp_world, 1), dp_world)
        assert 0 <= dp_rank < dp_world, (dp_rank, dp_world)
        micro = micro_batch_size or -(-batch_size // dp_world)
        reader = StepReader(rows, batch_size, micro, dp_rank, dp_world, vocab_size, mask, ramp)
        self.reader = reader.start()
        self.start_step = start_step
        self.eod_id = eod_id
        self.prompt_weight = prompt_weight
        self.workers = workers
        self.plans = plans

    def __repr__(self) -> str:
        shares = f"{self.micro_steps} micro-batches of {self.reader.micro} rows a step"
        return f"StepLoader({self.reader.rows!r}, {shares} from step {self.start_step})"

    @property
    def micro_steps(self) -> int:
        """Micro-batches that this rank takes in one step."""
        return self.reader.micro_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        if self.workers:
            steps = read_in_processes(self.reader, self.tasks(), self.workers)
        elif self.plans is not None:
            # One thread reads ahead. Plans are drawn by the thread that takes the steps, which
            # knows the losses.
            pool = Background(1, "data")
            steps = in_order(pool, self.reader.read, self.tasks(), 1 + AHEAD)
        else:
            steps = read_in_thread(self.reader, self.start_step)
        with closing(steps):
            for step in steps:
                yield [as_batch(rows, self.eod_id, self.prompt_weight) for rows in step]

    def tasks(self) -> Iterator[ReadTask | None]:
        """The steps to read, in order; None while the next one is not planned yet."""
        if self.plans is None:
            for step in itertools.count(self.start_step):
                yield step, None
            return
        step = self.start_step
        for plan in self.plans:
            if plan is None:
                yield None
                continue
            yield step, [plan(share.start, share.stop) for share in self.reader.shares(step)]
            step += 1


def as_batch(micro_rows: MicroRows, eod_id: int | None, prompt_weight: float = 0.0) -> Batch:
    """Rows as tokens and labels; the label of a token is the next token, or IGNORED.

    With a `prompt_weight` the tokens that label files leave out are targets that count so much.
    """
    rows = torch.from_numpy(micro_rows.rows)
    tokens = rows[:, :-1].contiguous()
    # A clone, not `contiguous`: of a single row, tokens and labels would share memory.
    labels = rows[:, 1:].clone()
    if micro_rows.labels is not None:
        labels = torch.from_numpy(micro_rows.labels[:, 1:].copy())
    weights = None
    if micro_rows.label_weights is not None:
        weights = torch.from_numpy(micro_rows.label_weights[:, 1:].copy())
    if prompt_weight and micro_rows.labels is not None:
        of_prompt = labels == IGNORED
        labels[of_prompt] = rows[:, 1:][of_prompt]
        if weights is None:
            weights = torch.ones(labels.shape)
        weights[of_prompt] = prompt_weight
    if eod_id is not None:
        labels[tokens == eod_id] = IGNORED
    if micro_rows.ignored is not None:
        # Last of those of tokens: a weight of prompts makes targets again.
        labels[torch.from_numpy(micro_rows.ignored[:, 1:])] = IGNORED
    index = torch.from_numpy(micro_rows.index)
    labels[index == PADDING_ROW] = IGNORED
    filled = None
    if micro_rows.filled is not None:
        filled = torch.from_numpy(micro_rows.filled)
        labels[torch.arange(1, rows.shape[1]) >= filled[:, None]] = IGNORED
    source = torch.from_numpy(micro_rows.source)
    batch = Batch(tokens, labels, source, index, weights=weights, filled=filled)
    if micro_rows.paired:
        batch = replace(batch, group=index)
    if micro_rows.reference is not None:
        # Number t is that of token t + 1 already, the label of place t.
        reference = torch.from_numpy(micro_rows.reference[:, :-1]).contiguous()
        batch = replace(batch, reference=reference)
    if micro_rows.reward is not None:
        batch = replace(batch, reward=torch.from_numpy(micro_rows.reward))
    if micro_rows.segments is None:
        return batch
    segments = micro_rows.segments[:, :-1]
    # The target belongs to the next document.
    labels[torch.from_numpy(micro_rows.segments[:, 1:] != segments)] = IGNORED
    return replace(
        batch,
        segments=torch.from_numpy(segments).contiguous(),
        positions=torch.from_numpy(positions_within(segments)),
    )


def read_in_processes(reader: StepReader, tasks: Iterator[ReadTask | None], workers: int) -> Steps:
    """Steps in the order of `tasks`, read by `workers` processes that closing the iterator ends."""
    pool = WorkerPool(workers, start_worker, reader, patience=PATIENCE)
    try:
        yield from in_order(pool, read_in_worker, tasks, workers + AHEAD)
    except BrokenProcessPool as error:
        reason = (
            f"a data worker process died ({error}); set data.workers to a smaller number, or to 0"
        )
        raise DataError(pool.why_none_began or reason) from error


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
        thread.join(PATIENCE)
        if thread.is_alive():
            leave_behind("the thread that reads ahead")


def fill(
    reader: StepReader,
    start: int,
    ready: queue.Queue[list[MicroRows] | BaseException],
    stopped: threading.Event,
) -> None:
    """The reading thread: fill `ready` until `stopped`. An error replaces its step and ends it."""
    for step in itertools.count(start):
        item: list[MicroRows] | BaseException
        try:
            item = reader.read(step)
        except BaseException as error:
            item = error
        while not stopped.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if stopped.is_set() or isinstance(item, BaseException):
            return
