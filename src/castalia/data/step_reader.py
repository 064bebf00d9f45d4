"""Which rows one process takes in one step, as numpy: a pure function of the step. Needs no torch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.labels import label_row
from castalia.data.mapped import read_at_random
from castalia.data.packed import DocumentRows, Span
from castalia.data.packing_order import PaddedRows
from castalia.data.rows_by_source import RowPlaces, RowsBySource
from castalia.data.run_rows import BlendedRows, out_of_vocab
from castalia.data.segments import DocumentMask

PADDING = -1
"""Index of a row that stands for none: nothing of it counts."""


@dataclass(frozen=True)
class MicroRows:
    """Rows of one micro-batch: rows (B, T + 1) int64, source (B,) int32, index (B,) int64, -1 for padding, and
    segments (B, T + 1) int64 where documents are told apart. Of rows that may end early `filled` (B,) is how many
    tokens are there. `labels` (B, T + 1) are those of label files, -100 where a token is no target."""

    rows: NDArray[np.int64]
    source: NDArray[np.int32]
    index: NDArray[np.int64]
    segments: NDArray[np.int64] | None = None
    filled: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class StepReader:
    """`reader.read(t)` is what rank `rank` of `world` processes takes in step t, a micro-batch at a time.

    Step t uses places [t·B, (t+1)·B); its micro-step g is the next micro·world of them, or what is left, in shares
    that differ by one row at most: rank r takes the r-th. A rank whose share is empty takes a row of padding, so that
    all ranks run as often. Which row stands at a place is a matter of `rows`, or told for each micro-batch by a plan.
    Holds no state, and pickles.
    """

    rows: BlendedRows | RowsBySource
    batch_size: int
    micro: int
    rank: int
    world: int
    vocab_size: int | None = None
    mask: DocumentMask | None = None

    def start(self) -> "StepReader":
        """Once in each process that reads."""
        for pack in self.rows.row_sources:
            if isinstance(pack, DocumentRows):
                read_at_random(pack.dataset.buffer)
        return self

    @property
    def micro_steps(self) -> int:
        """Micro-batches in one step."""
        return -(-self.batch_size // (self.micro * self.world))

    @property
    def shares(self) -> list[range]:
        """The places within the batch of each of this rank's micro-batches."""
        whole, out = self.micro * self.world, []
        for done in range(0, self.batch_size, whole):
            rows = min(whole, self.batch_size - done)
            begin, end = (done + rows * r // self.world for r in (self.rank, self.rank + 1))
            out.append(range(begin, end))
        return out

    def read(self, step: int, planned: Sequence[RowPlaces] | None = None) -> list[MicroRows]:
        """This rank's micro-batches of one step; `planned` are their rows, where a plan says which.

        Raises  DataError for an id that is not in the vocabulary.
        """
        first = step * self.batch_size
        places = [range(first + share.start, first + share.stop) for share in self.shares]
        found = self.located(places) if planned is None else planned
        pieces = [
            self.pieces_of(rows) for rows in found
        ]  # of the whole step, before the first is read
        return [self.micro_batch(*given) for given in zip(places, found, pieces, strict=True)]

    def located(self, places: Sequence[range]) -> list[RowPlaces]:
        """The rows that stand at places of the served order, a micro-batch at a time."""
        pairs = [
            np.array([self.rows.locate(i) for i in index], np.int64).reshape(-1, 2)
            for index in places
        ]
        return [RowPlaces(pair[:, 0], pair[:, 1]) for pair in pairs]

    def pieces_of(self, found: RowPlaces) -> list[list[Span]]:
        """The stretches of documents of each row, which the kernel begins to read where it would not by itself."""
        out = []
        for source, place in zip(found.source.tolist(), found.place.tolist(), strict=True):
            pack = self.rows.row_sources[source]
            out.append(pack.documents_of(place))
            if isinstance(pack, DocumentRows):
                for dataset in (
                    pack.dataset,
                    *([self.rows.labels[source]] if self.rows.labels else []),
                ):
                    for piece in out[-1]:
                        dataset.fetch(*piece)
        return out

    def micro_batch(
        self, index: range, found: RowPlaces, pieces: Sequence[Sequence[Span]]
    ) -> MicroRows:
        """The rows of one micro-batch, which stand at the places `index` and consist of `pieces`."""
        if not index:
            padding = np.zeros((1, self.rows.row_sources[0].order.seq_length + 1), np.int64)
            segments = None if self.mask is None else padding
            return MicroRows(
                padding, np.zeros(1, np.int32), np.full(1, PADDING, np.int64), segments
            )
        sources = found.source.tolist()
        rows = np.stack(
            [
                self.rows.row_sources[source].row(made_of)
                for source, made_of in zip(sources, pieces, strict=True)
            ]
        )
        if self.vocab_size is not None:
            self.check(rows, sources, pieces, self.vocab_size)
        labels = self.labels_of(rows, sources, pieces)
        segments, filled = None, None
        if (mask := self.mask) is not None:
            segments = np.stack(
                [mask.segments(row, made_of) for row, made_of in zip(rows, pieces, strict=True)]
            )
        if any(isinstance(pack, PaddedRows) for pack in self.rows.row_sources):
            filled = np.array(
                [sum(piece.length for piece in made_of) for made_of in pieces], np.int64
            )
        return MicroRows(
            rows, found.source.astype(np.int32), np.array(index, np.int64), segments, filled, labels
        )

    def labels_of(
        self, rows: NDArray[np.int64], sources: Sequence[int], pieces: Sequence[Sequence[Span]]
    ) -> NDArray[np.int64] | None:
        """The labels of rows out of label files; None without any.

        Raises  DataError if one is neither the token itself nor negative.
        """
        if (files := self.rows.labels) is None:
            return None
        length = rows.shape[1]
        given = zip(sources, pieces, strict=True)
        found = np.stack([label_row(files[source], made_of, length) for source, made_of in given])
        if len(wrong := np.flatnonzero(((found >= 0) & (found != rows)).any(1))):
            raise DataError(
                f"{files[sources[int(wrong[0])]].prefix}: a label is neither its token nor -100; make the file again"
                " of the same tokens"
            )
        return found

    def check(
        self,
        rows: NDArray[np.int64],
        sources: Sequence[int],
        pieces: Sequence[Sequence[Span]],
        vocab_size: int,
    ) -> None:
        """Every id is in the vocabulary."""
        if rows.max() < vocab_size and rows.min() >= 0:
            return
        i, j = np.argwhere((rows >= vocab_size) | (rows < 0))[0].tolist()
        ends = list(itertools.accumulate(piece.length for piece in pieces[i]))
        document = next(
            piece.document for piece, end in zip(pieces[i], ends, strict=True) if j < end
        )
        prefix = self.rows.row_sources[sources[i]].dataset.prefix
        raise DataError(out_of_vocab(prefix, document, int(rows[i, j]), vocab_size))


def check_batch(batch_size: int, micro: int, world: int) -> None:
    """The batch falls into whole micro-batches on every process.

    Raises  ConfigError with the numbers and one that works.
    """
    if batch_size % (micro * world):
        near = max(batch_size // (micro * world), 1) * micro * world
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide into micro-batches of {micro} rows on {world}"
            f" process{'es' if world > 1 else ''}: it must be a multiple of {micro} x {world} = {micro * world};"
            f" try train.batch_size={near} or another train.micro_batch_size, or allow shares that differ with"
            " parallel.uneven=true"
        )


READER: list[StepReader] = []
"""The reader of this worker process, set once when it starts."""


def start_worker(reader: StepReader) -> None:
    """In a worker: keep the reader, so that each task carries only a step number."""
    READER[:] = [reader.start()]


def read_in_worker(step: int, planned: Sequence[RowPlaces] | None = None) -> list[MicroRows]:
    """In a worker: one step."""
    return READER[0].read(step, planned)
