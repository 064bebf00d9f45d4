"""Batches as a pure function of the step, the same for any number of processes, workers and micro-batches."""

import itertools
import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from castalia.core.errors import ConfigError, DataError
from castalia.data.batch import IGNORED, Batch
from castalia.data.rows import RowDataset, out_of_vocab

AHEAD = 1
"""Steps that wait, read, while the thread reads the next one."""


class StepLoader:
    """Iterating gives, for step start_step, start_step + 1, … without end, this rank's micro-batches of the step.

    Step t uses places [t·B, (t+1)·B) of `rows`, B = batch_size; its micro-step g is the next micro·world of them, of
    which rank r takes the r-th `micro` rows. `micro_batch_size` None is the rank's whole share B / world.

    `vocab_size` checks every id. `eod_id` leaves out of the loss the target after each end-of-document token in the
    row (GPT-NeoX's eod_mask_loss). `workers` 0 reads ahead in a thread; more are processes, each with its own copy
    of the order's index, and the batches are the same.

    Raises  ConfigError if batch_size does not divide; DataError, where the batch is taken, for an id that is not in
            the vocabulary or a file that went away.
    """

    def __init__(
        self,
        rows: RowDataset,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        dp_rank: int = 0,
        dp_world: int = 1,
        start_step: int = 0,
        vocab_size: int | None = None,
        eod_id: int | None = None,
        workers: int = 0,
    ) -> None:
        micro = micro_batch_size or max(batch_size // dp_world, 1)
        check_batch(batch_size, micro, dp_world)
        assert 0 <= dp_rank < dp_world, (dp_rank, dp_world)
        self.steps = StepDataset(rows, batch_size, micro, dp_rank, dp_world, vocab_size, eod_id)
        self.start_step, self.workers = start_step, workers

    @property
    def micro_steps(self) -> int:
        """Micro-batches that this rank takes in one step."""
        return self.steps.micro_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        if not self.workers:
            return read_ahead(self.steps, self.start_step)
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=StepsFrom(self.start_step),
            num_workers=self.workers,
            multiprocessing_context="spawn",
        )
        return iter(loader)


def check_batch(batch_size: int, micro: int, world: int) -> None:
    """The batch falls into whole micro-batches on every process."""
    if batch_size % (micro * world):
        near = max(batch_size // (micro * world), 1) * micro * world
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide into micro-batches of {micro} rows on {world}"
            f" process{'es' if world > 1 else ''}: it must be a multiple of {micro} x {world} = {micro * world};"
            f" try train.batch_size={near} or another train.micro_batch_size"
        )


class StepDataset(Dataset[list[Batch]]):
    """`steps[t]` is one rank's micro-batches of step t; it holds no state, and pickles."""

    def __init__(
        self,
        rows: RowDataset,
        batch_size: int,
        micro: int,
        rank: int,
        world: int,
        vocab_size: int | None,
        eod_id: int | None,
    ) -> None:
        self.rows, self.batch_size, self.micro, self.rank, self.world = rows, batch_size, micro, rank, world
        self.vocab_size, self.eod_id = vocab_size, eod_id

    @property
    def micro_steps(self) -> int:
        """Micro-batches in one step."""
        return self.batch_size // (self.micro * self.world)

    def __getitem__(self, step: int) -> list[Batch]:
        first = step * self.batch_size + self.rank * self.micro
        return [self.micro_batch(first + g * self.micro * self.world) for g in range(self.micro_steps)]

    def micro_batch(self, first: int) -> Batch:
        """Places [first, first + micro) as one batch."""
        found = [self.rows[first + i] for i in range(self.micro)]
        rows = torch.from_numpy(np.stack([row for row, _, _ in found]))
        self.check(rows, first)
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.eod_id is not None:
            labels[tokens == self.eod_id] = IGNORED
        return Batch(
            tokens=tokens,
            labels=labels,
            source=torch.tensor([source for _, source, _ in found], dtype=torch.int32),
            index=torch.tensor([index for _, _, index in found], dtype=torch.int64),
        )

    def check(self, rows: torch.Tensor, first: int) -> None:
        """Every id is in the vocabulary."""
        if self.vocab_size is None or (int(rows.max()) < self.vocab_size and int(rows.min()) >= 0):
            return
        i, j = ((rows >= self.vocab_size) | (rows < 0)).nonzero()[0].tolist()
        source, pieces = self.rows.documents_of(first + i)
        ends = list(itertools.accumulate(piece.length for piece in pieces))
        document = next(piece.document for piece, end in zip(pieces, ends, strict=True) if j < end)
        raise DataError(
            out_of_vocab(self.rows.packs[source].dataset.prefix, document, int(rows[i, j]), self.vocab_size)
        )


class StepsFrom(Sampler[int]):
    """Step numbers from `start` on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def read_ahead(steps: StepDataset, start: int) -> Iterator[list[Batch]]:
    """Batches of `start` and later steps, read in a thread; closing the iterator ends the thread."""
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=AHEAD)
    stopped = threading.Event()
    thread = threading.Thread(target=read_steps, args=(steps, start, ready, stopped), daemon=True, name="data")
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while thread.is_alive():
            if not ready.empty():
                ready.get_nowait()
            thread.join(timeout=0.01)


def read_steps(steps: StepDataset, start: int, ready: queue.Queue, stopped: threading.Event) -> None:
    """The thread: fill `ready` until `stopped`; an error is handed over in place of a batch."""
    for step in itertools.count(start):
        try:
            item: list[Batch] | BaseException = steps[step]
        except BaseException as error:
            item = error
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if stopped.is_set() or isinstance(item, BaseException):
            return
