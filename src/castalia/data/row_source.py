"""One source cut into rows: where the tokens of each row come from, and the row itself."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.span_table import DocumentSpan, SpanTable


class RowPlaces(NamedTuple):
    """Rows to read: their source, and their place in that source's order; both (n,) int64."""

    source: NDArray[np.int64]
    place: NDArray[np.int64]


class RowOrder(Protocol):
    """The rows of a source, and the order in which they are served.

    `seq_length` and `tokens_per_epoch` are in tokens; `epochs` is the number of passes over the
    documents.
    """

    seq_length: int
    epochs: int
    tokens_per_epoch: int

    @property
    def shuffle_idx(self) -> NDArray[Any] | range:
        """The row served at each place."""

    def __len__(self) -> int:
        """The period after which places repeat."""

    def wrap(self, index: int) -> int:
        """The place in `shuffle_idx` for any place >= 0."""


Order = TypeVar("Order", bound=RowOrder)


class RowSource(ABC, Generic[Order]):
    """Rows of `dataset` under `order`: `rows[i]` is the row at place i, (seq_length + 1,) int64.

    A row that ends early is padded with 0.
    Raises  IndexError for a place without a row (`order.wrap` gives the place that GPT-NeoX serves
            instead); DataError if the file holds floats.
    """

    scattered = True
    """Whether consecutive rows lie far apart in the file, where read-ahead is wasted."""
    padded = False
    """Whether rows may end early."""

    def __init__(self, dataset: IndexedDataset, order: Order) -> None:
        require_tokens(dataset)
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        shape = f"{len(self):,} rows of {self.order.seq_length} tokens"
        return f"{type(self).__name__}({self.dataset.prefix!r}, {shape})"

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.row(self.documents_of(index))

    def other(self, dataset: IndexedDataset) -> "RowSource[Order]":
        """Rows of the same kind and order of another file, the other side of pairs."""
        return type(self)(dataset, self.order)

    def row(self, spans: Sequence[DocumentSpan]) -> NDArray[np.int64]:
        """The row made of these spans, (seq_length + 1,)."""
        row = np.zeros(self.order.seq_length + 1, np.int64)
        filled = 0
        for document, start, length in spans:
            row[filled : filled + length] = self.dataset.get(document, start, length)
            filled += length
        return row

    def documents_of(self, index: int) -> list[DocumentSpan]:
        """The non-empty spans of documents in the row served at place `index`, in order."""
        place = operator.index(index)
        served = self.order.shuffle_idx
        if not 0 <= place < len(served):
            raise IndexError(f"row {index} of {len(served)} in {self.dataset.prefix}")
        return [span for span in self.spans(int(served[place])) if span.length]

    def table(self, places: NDArray[np.int64]) -> SpanTable:
        """What `documents_of` gives for each of (n,) places."""
        served = self.order.shuffle_idx
        wrong = np.flatnonzero((places < 0) | (places >= len(served)))
        if len(wrong):
            raise IndexError(f"row {places[wrong[0]]} of {len(served)} in {self.dataset.prefix}")
        rows = places if isinstance(served, range) else served[places].astype(np.int64)
        return self.spans_of(rows).without_empty()

    def spans_of(self, rows: NDArray[np.int64]) -> SpanTable:
        """What `spans` gives for each of (n,) rows. Sources with an order in arrays are faster."""
        return SpanTable.of_lists([self.spans(row) for row in rows.tolist()])

    @abstractmethod
    def spans(self, row: int) -> list[DocumentSpan]:
        """The spans of a row, by its number before the shuffle. Empty spans are allowed."""
