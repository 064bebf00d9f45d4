"""The rows that one rank takes in one step, in numpy: a pure function of the step. Needs no
torch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.batch_sizes import BatchSizes, Ramp
from castalia.data.labels import label_row, weight_row
from castalia.data.row_changes import ServedRow
from castalia.data.row_source import DocumentSpan, RowPlaces
from castalia.data.segments import DocumentMask
from castalia.data.served import ServedRows
from castalia.data.vocabulary import out_of_vocab

SpansOfRows = Sequence[Sequence[DocumentSpan]]
PADDING_ROW = -1
"""Index of a row of padding, none of whose tokens count."""


@dataclass(frozen=True)
class MicroRows:
    """Rows of one micro-batch, (B, T + 1): T inputs and the targets one place later."""

    rows: NDArray[np.int64]
    """Tokens, (B, T + 1)."""
    source: NDArray[np.int32]
    """Source of each row, (B,)."""
    index: NDArray[np.int64]
    """Place of each row in the served order, (B,); PADDING_ROW for padding."""
    segments: NDArray[np.int64] | None = None
    """Document of each token, (B, T + 1), if documents are kept apart."""
    filled: NDArray[np.int64] | None = None
    """Tokens before the padding of each row, (B,), if rows may end early."""
    labels: NDArray[np.int64] | None = None
    """Labels from label files, (B, T + 1), -100 where a token is not a target."""
    label_weights: NDArray[np.float32] | None = None
    """How much each target counts, (B, T + 1), if files say so."""
    reference: NDArray[np.float32] | None = None
    """Log-probability of the next token under a reference model, (B, T + 1), in nats."""
    reward: NDArray[np.float32] | None = None
    """The number of the first document of each row, (B,), if there are such."""
    ignored: NDArray[np.bool_] | None = None
    """Tokens that are no targets, (B, T + 1), if a change of the rows put such tokens there."""
    paired: bool = False
    """Whether rows 2i and 2i + 1 are a pair, the preferred one first, both with the same index."""


@dataclass(frozen=True)
class StepReader:
    """`reader.read(t)` is rank `rank`'s share of step t, of `world` ranks, a micro-batch at a time.

    Step t uses places [t·B, (t+1)·B), B = batch_size; under a ramp of batch sizes those that
    `BatchSizes` gives it. Micro-step g takes the next micro·world of
    them, or what is left, in shares that differ by at most one row; rank r takes the r-th. A rank
    whose share is empty takes a row of padding, because all ranks must run equally often. The row
    at each place comes from `rows`, or from a plan of the micro-batch. Of pairs, a place is a pair,
    and `batch_size` and `micro` count pairs. Stateless; pickles.
    """

    rows: ServedRows
    batch_size: int
    micro: int
    rank: int
    world: int
    vocab_size: int | None = None
    mask: DocumentMask | None = None
    ramp: Ramp | None = None

    def start(self) -> "StepReader":
        """Prepare this process for reading. Call it once in each."""
        for side in self.rows.sides:
            for source in side.row_sources:
                if source.scattered:
                    source.dataset.buffer.read_at_random()
        return self

    @cached_property
    def sizes(self) -> BatchSizes:
        """Rows of each step."""
        return BatchSizes(self.batch_size, self.ramp)

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a step with a full batch."""
        return -(-self.batch_size // (self.micro * self.world))

    def shares(self, step: int) -> list[range]:
        """The places within the step's batch of each of this rank's micro-batches."""
        whole = self.micro * self.world
        size = self.sizes.size(step)
        shares = []
        for done in range(0, size, whole):
            rows = min(whole, size - done)
            begin = done + rows * self.rank // self.world
            end = done + rows * (self.rank + 1) // self.world
            shares.append(range(begin, end))
        return shares

    def read(self, step: int, planned: Sequence[RowPlaces] | None = None) -> list[MicroRows]:
        """This rank's micro-batches of one step; `planned` are their rows, if a plan chooses them.

        Raises  DataError for an id outside the vocabulary.
        """
        first = self.sizes.first(step)
        shares = self.shares(step)
        places = [range(first + share.start, first + share.stop) for share in shares]
        located = self.locate(places) if planned is None else planned
        # Look up the whole step before reading any row, so that the disk works on all rows at once.
        spans = [self.look_up(rows) for rows in located]
        micro_batches = zip(places, located, spans, strict=True)
        return [self.micro_batch(*micro_batch) for micro_batch in micro_batches]

    def locate(self, places: Sequence[range]) -> list[RowPlaces]:
        """The rows at places of the served order, a micro-batch at a time."""
        return [self.rows.locate_all(indices) for indices in places]

    def look_up(self, rows: RowPlaces) -> list[SpansOfRows]:
        """The spans of each row, for each side; starts reading them from disk where rows are
        scattered."""
        return [look_up(side, rows) for side in self.rows.sides]

    def micro_batch(
        self, index: range, located: RowPlaces, spans_of_sides: Sequence[SpansOfRows]
    ) -> MicroRows:
        """The rows of one micro-batch, at the places `index`, made of these spans."""
        if not index:
            return self.padding_batch()
        sides = zip(self.rows.sides, spans_of_sides, strict=True)
        micro_rows = [self.side_of(side, index, located, spans) for side, spans in sides]
        return micro_rows[0] if len(micro_rows) == 1 else interleaved(*micro_rows)

    def side_of(
        self, side: ServedRows, index: range, located: RowPlaces, spans_of_rows: SpansOfRows
    ) -> MicroRows:
        """The rows of one side of a micro-batch, of which texts have one."""
        numbers = located.source.tolist()
        served = []
        for number, spans, place in zip(numbers, spans_of_rows, index, strict=True):
            served.append(side.served(number, spans, place))
        rows = np.stack([row.tokens for row in served])
        if self.vocab_size is not None:
            check(side, rows, numbers, [row.spans for row in served], self.vocab_size)
        segments = None
        mask = self.mask
        if mask is not None:
            segments = np.stack([mask.segments(row.tokens, row.spans) for row in served])
        filled = None
        if any(source.padded for source in side.row_sources):
            lengths = [sum(span.length for span in row.spans) for row in served]
            filled = np.array(lengths, np.int64)
        return MicroRows(
            rows=rows,
            source=located.source.astype(np.int32),
            index=np.array(index, np.int64),
            segments=segments,
            filled=filled,
            labels=labels_of(side, rows, served, numbers, spans_of_rows),
            label_weights=weights_of(side, served, numbers, spans_of_rows),
            reference=reference_of(side, rows, numbers, spans_of_rows),
            reward=reward_of(side, numbers, spans_of_rows),
            ignored=ignored_of(side, served),
        )

    def padding_batch(self) -> MicroRows:
        """One row of padding, or one pair, for a rank whose share of a micro-step is empty."""
        count = len(self.rows.sides)
        rows = np.zeros((count, self.rows.seq_length + 1), np.int64)
        padded = any(source.padded for source in self.rows.row_sources)
        return MicroRows(
            rows=rows,
            source=np.zeros(count, np.int32),
            index=np.full(count, PADDING_ROW, np.int64),
            segments=None if self.mask is None else rows,
            filled=np.zeros(count, np.int64) if padded else None,
            reference=None if self.rows.reference is None else np.zeros(rows.shape, np.float32),
            reward=None if self.rows.rewards is None else np.zeros(count, np.float32),
            paired=count == 2,
        )


def look_up(side: ServedRows, rows: RowPlaces) -> SpansOfRows:
    """The spans of each row of one side; starts reading them from disk where rows are scattered."""
    all_files = (side.labels, side.label_weights, side.reference)
    beside = [files for files in all_files if files is not None]
    spans_of_rows = []
    for number, place in zip(rows.source.tolist(), rows.place.tolist(), strict=True):
        source = side.row_sources[number]
        spans = source.documents_of(place)
        spans_of_rows.append(spans)
        if not source.scattered:
            continue
        for span in spans:
            source.dataset.fetch(*span)
            for files in beside:
                files[number].fetch(*span)
    return spans_of_rows


def labels_of(
    side: ServedRows,
    rows: NDArray[np.int64],
    served: Sequence[ServedRow],
    numbers: Sequence[int],
    spans_of_rows: SpansOfRows,
) -> NDArray[np.int64] | None:
    """The labels of `rows`, (B, T + 1), of the sources `numbers`; None without label files.

    Raises  DataError if a label is neither the token itself nor negative.
    """
    files = side.labels
    if files is None:
        return None
    length = rows.shape[1]
    label_rows = []
    for row, number, spans in zip(served, numbers, spans_of_rows, strict=True):
        labels = label_row(files[number], spans, length)
        # The files' labels are those of the unchanged tokens.
        label_rows.append(labels if row.origin is None else row.labels(labels))
    labels = np.stack(label_rows)
    wrong = np.flatnonzero(((labels >= 0) & (labels != rows)).any(1))
    if len(wrong):
        file = files[numbers[int(wrong[0])]]
        raise DataError(
            f"{file.prefix}: a label is neither its token nor -100; make the label file again"
            " from the same tokens"
        )
    return labels


def weights_of(
    side: ServedRows,
    served: Sequence[ServedRow],
    numbers: Sequence[int],
    spans_of_rows: SpansOfRows,
) -> NDArray[np.float32] | None:
    """The weights of rows of the sources `numbers`; None without files of weights."""
    files = side.label_weights
    if files is None:
        return None
    weights = []
    for row, number, spans in zip(served, numbers, spans_of_rows, strict=True):
        weights.append(row.moved(weight_row(files[number], spans, len(row.tokens))))
    return np.stack(weights)


def ignored_of(side: ServedRows, served: Sequence[ServedRow]) -> NDArray[np.bool_] | None:
    """The tokens that changes of the rows made no targets; None without changes."""
    if side.changes is None:
        return None
    none = np.zeros(len(served[0].tokens), np.bool_)
    return np.stack([none if row.ignored is None else row.ignored for row in served])


def reference_of(
    side: ServedRows, rows: NDArray[np.int64], numbers: Sequence[int], spans_of_rows: SpansOfRows
) -> NDArray[np.float32] | None:
    """The log-probabilities under a reference model; None without files of them."""
    files = side.reference
    if files is None:
        return None
    reference = np.zeros(rows.shape, np.float32)
    for row, number, spans in zip(reference, numbers, spans_of_rows, strict=True):
        filled = 0
        for document, start, length in spans:
            # A file need not have a number for the last token, after which there is nothing.
            count = min(length, int(files[number].sizes[document]) - start)
            row[filled : filled + count] = files[number].get(document, start, count)
            filled += length
    return reference


def reward_of(
    side: ServedRows, numbers: Sequence[int], spans_of_rows: SpansOfRows
) -> NDArray[np.float32] | None:
    """The number of each row's first document; None without rewards."""
    rewards = side.rewards
    if rewards is None:
        return None
    pairs = zip(numbers, spans_of_rows, strict=True)
    return np.array([rewards[number][spans[0].document] for number, spans in pairs], np.float32)


def check(
    side: ServedRows,
    rows: NDArray[np.int64],
    numbers: Sequence[int],
    spans_of_rows: SpansOfRows,
    vocab_size: int,
) -> None:
    """Check that every id is in the vocabulary.

    Raises  DataError naming file, document and id.
    """
    if rows.max() < vocab_size and rows.min() >= 0:
        return
    row, column = np.argwhere((rows >= vocab_size) | (rows < 0))[0].tolist()
    spans = spans_of_rows[row]
    ends = itertools.accumulate(span.length for span in spans)
    covering = (span for span, end in zip(spans, ends, strict=True) if column < end)
    document = next(covering).document
    prefix = side.row_sources[numbers[row]].dataset.prefix
    raise DataError(out_of_vocab(prefix, document, int(rows[row, column]), vocab_size))


def interleaved(chosen: MicroRows, rejected: MicroRows) -> MicroRows:
    """The rows of both sides of pairs, (2B, T + 1): each preferred one before its rejected one."""
    values: dict[str, Any] = {}
    if chosen.reward is not None:
        # A number belongs to both, as the margin of a pair does.
        rejected = replace(rejected, reward=np.zeros_like(chosen.reward))
    for field in fields(MicroRows):
        pair = (getattr(chosen, field.name), getattr(rejected, field.name))
        if isinstance(pair[0], np.ndarray) and isinstance(pair[1], np.ndarray):
            values[field.name] = np.stack(pair, 1).reshape(-1, *pair[0].shape[1:])
    return MicroRows(**values, paired=True)


def check_batch(batch_size: int, micro: int, world: int) -> None:
    """Check that the batch divides into whole micro-batches on every rank.

    Raises  ConfigError with the numbers and a batch size that works.
    """
    whole = micro * world
    if batch_size % whole:
        nearby = max(batch_size // whole, 1) * whole
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        raise ConfigError(
            f"train.batch_size {batch_size} is not divisible into micro-batches of {micro} rows on"
            f" {ranks}: it must be a multiple of {micro} x {world} = {whole}; try"
            f" train.batch_size={nearby} or another train.micro_batch_size, or allow unequal shares"
            " with parallel.uneven=true"
        )


READER: list[StepReader] = []
"""The reader of this worker process, set once when it starts."""


def start_worker(reader: StepReader) -> None:
    """In a worker: keep the reader, so that each task carries a step number only."""
    READER[:] = [reader.start()]


def read_in_worker(step: int, planned: Sequence[RowPlaces] | None = None) -> list[MicroRows]:
    """In a worker: read one step."""
    return READER[0].read(step, planned)
