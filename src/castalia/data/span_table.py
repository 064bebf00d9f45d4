"""`SpanTable`: the pieces of documents in many rows at once, as arrays."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class DocumentSpan(NamedTuple):
    """Part of a document: tokens [start, start + length) of document `document`."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class SpanTable:
    """The spans of n rows, one after the other: row i has spans bounds[i] to bounds[i + 1] - 1.

    Shapes  bounds (n + 1,), the first 0; documents, starts and lengths (p,); all int64.
    """

    bounds: NDArray[np.int64]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of_lists(cls, spans_of_rows: Sequence[Sequence[DocumentSpan]]) -> "SpanTable":
        """The table of rows whose spans are given as lists."""
        spans = [span for spans in spans_of_rows for span in spans]
        fields = np.array(spans, np.int64).reshape(-1, 3).T
        counts = [len(spans) for spans in spans_of_rows]
        return cls(bounds_of(np.array(counts, np.int64)), *fields)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.bounds) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Spans of each row, (n,)."""
        return np.diff(self.bounds)

    @property
    def row_of_span(self) -> NDArray[np.int64]:
        """The row that each span is in, (p,)."""
        return np.repeat(np.arange(len(self)), self.counts)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The token of its row at which each span begins, (p,)."""
        before = bounds_of(self.lengths)
        # The tokens of all rows before its own are subtracted from those before the span.
        return before[:-1] - np.repeat(before[self.bounds[:-1]], self.counts)

    def row(self, number: int) -> list[DocumentSpan]:
        """The spans of one row."""
        begin, end = self.bounds[number : number + 2].tolist()
        return [DocumentSpan(*span) for span in zip(*self.columns(begin, end), strict=True)]

    def part(self, begin: int, end: int) -> "SpanTable":
        """The table of rows `begin` to `end` - 1."""
        bounds = self.bounds[begin : end + 1]
        spans = slice(int(bounds[0]), int(bounds[-1]))
        arrays = (self.documents[spans], self.starts[spans], self.lengths[spans])
        return SpanTable(bounds - bounds[0], *arrays)

    def cut(self, tokens: int) -> "SpanTable":
        """The table of the same rows without what lies beyond their first so many tokens."""
        lengths = np.clip(tokens - self.offsets, 0, self.lengths)
        return SpanTable(self.bounds, self.documents, self.starts, lengths).without_empty()

    def lists(self) -> list[list[DocumentSpan]]:
        """The spans of each row."""
        spans = [DocumentSpan(*span) for span in zip(*self.columns(), strict=True)]
        bounds = self.bounds.tolist()
        return [spans[begin:end] for begin, end in itertools.pairwise(bounds)]

    def columns(self, begin: int = 0, end: int | None = None) -> list[list[int]]:
        """Documents, starts and lengths of spans `begin` to `end` - 1, as numbers of Python."""
        arrays = (self.documents, self.starts, self.lengths)
        return [array[begin:end].tolist() for array in arrays]

    def without_empty(self) -> "SpanTable":
        """The table without its spans of no token."""
        kept = self.lengths > 0
        if kept.all():
            return self
        before = np.concatenate(([0], np.cumsum(kept)))
        arrays = (self.documents[kept], self.starts[kept], self.lengths[kept])
        return SpanTable(before[self.bounds], *arrays)


def bounds_of(counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Where runs of so many things begin, one after the other, and where the last one ends:
    (n,) -> (n + 1,)."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds


def runs(begins: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers begins[i], begins[i] + 1, … of which there are counts[i], for each i in turn."""
    bounds = bounds_of(counts)
    return np.arange(bounds[-1]) + np.repeat(begins - bounds[:-1], counts)


def joined(tables: Sequence[SpanTable], rows: Sequence[NDArray[np.int64]], count: int) -> SpanTable:
    """One table of `count` rows; rows[k] are the rows that those of tables[k] become."""
    if len(tables) == 1 and len(tables[0]) == count and np.array_equal(rows[0], np.arange(count)):
        return tables[0]
    counts = np.zeros(count, np.int64)
    for table, numbers in zip(tables, rows, strict=True):
        counts[numbers] = table.counts
    bounds = bounds_of(counts)
    whole = SpanTable(bounds, *(np.empty(bounds[-1], np.int64) for _ in range(3)))
    for table, numbers in zip(tables, rows, strict=True):
        places = runs(bounds[numbers], table.counts)
        whole.documents[places] = table.documents
        whole.starts[places] = table.starts
        whole.lengths[places] = table.lengths
    return whole
