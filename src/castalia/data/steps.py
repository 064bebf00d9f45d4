"""Which rows one process takes in one step, as numpy: a pure function of the step. Needs no torch."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.rows import RowDataset, out_of_vocab


@dataclass(frozen=True)
class MicroRows:
    """Rows of one micro-batch: rows (B, T + 1) int64, source (B,) int32, index (B,) int64."""

    rows: NDArray[np.int64]
    source: NDArray[np.int32]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class StepReader:
    """`reader.read(t)` is what rank `rank` of `world` processes takes in step t, a micro-batch at a time.

    Step t uses places [t·B, (t+1)·B); its micro-step g is the next micro·world of them, of which rank r takes the
    r-th `micro` rows. Holds no state, and pickles.
    """

    rows: RowDataset
    batch_size: int
    micro: int
    rank: int
    world: int
    vocab_size: int | None = None

    @property
    def micro_steps(self) -> int:
        """Micro-batches in one step."""
        return self.batch_size // (self.micro * self.world)

    def read(self, step: int) -> list[MicroRows]:
        """This rank's micro-batches of one step.

        Raises  DataError for an id that is not in the vocabulary.
        """
        first = step * self.batch_size + self.rank * self.micro
        return [self.micro_batch(first + g * self.micro * self.world) for g in range(self.micro_steps)]

    def micro_batch(self, first: int) -> MicroRows:
        """Places [first, first + micro)."""
        rows, source, index = zip(*(self.rows[first + i] for i in range(self.micro)), strict=True)
        found = MicroRows(np.stack(rows), np.array(source, np.int32), np.array(index, np.int64))
        if self.vocab_size is not None:
            self.check(found, self.vocab_size)
        return found

    def check(self, found: MicroRows, vocab_size: int) -> None:
        """Every id is in the vocabulary."""
        if found.rows.max() < vocab_size and found.rows.min() >= 0:
            return
        i, j = np.argwhere((found.rows >= vocab_size) | (found.rows < 0))[0].tolist()
        source, pieces = self.rows.documents_of(int(found.index[i]))
        ends = list(itertools.accumulate(piece.length for piece in pieces))
        document = next(piece.document for piece, end in zip(pieces, ends, strict=True) if j < end)
        prefix = self.rows.packs[source].dataset.prefix
        raise DataError(out_of_vocab(prefix, document, int(found.rows[i, j]), vocab_size))


def check_batch(batch_size: int, micro: int, world: int) -> None:
    """The batch falls into whole micro-batches on every process.

    Raises  ConfigError with the numbers and one that works.
    """
    if batch_size % (micro * world):
        near = max(batch_size // (micro * world), 1) * micro * world
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide into micro-batches of {micro} rows on {world}"
            f" process{'es' if world > 1 else ''}: it must be a multiple of {micro} x {world} = {micro * world};"
            f" try train.batch_size={near} or another train.micro_batch_size"
        )


READER: list[StepReader] = []
"""The reader of this worker process, set once when it starts."""


def start_worker(reader: StepReader) -> None:
    """In a worker: keep the reader, so that each task carries only a step number."""
    READER[:] = [reader]


def read_in_worker(step: int) -> list[MicroRows]:
    """In a worker: one step."""
    return READER[0].read(step)
