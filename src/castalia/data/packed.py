"""Rows of tokens out of a token file, in GPT-NeoX's order, and the documents that each row came from."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.order import NeoxOrder


class Span(NamedTuple):
    """A stretch of one document: tokens [start, start + length) of document `document`."""

    document: int
    start: int
    length: int


class RowOrder(Protocol):
    """What rows need of an order: their length, which row stands at a place, and the period of what wraps around."""

    seq_length: int

    @property
    def shuffle_idx(self) -> NDArray[Any]:
        """The row that each place serves."""

    def __len__(self) -> int: ...


Order = TypeVar("Order", bound=RowOrder)


class DocumentRows(ABC, Generic[Order]):
    """Rows of stretches of documents of `dataset` under `order`: `rows[i]` is the row served at place i,
    (seq_length + 1,) int64, 0 after the last stretch of a row that ends early.

    Raises  IndexError for a place without a row (`order.wrap` says what GPT-NeoX serves there); DataError if the
            file holds floats.
    """

    def __init__(self, dataset: IndexedDataset, order: Order) -> None:
        require_tokens(dataset)
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.row(self.documents_of(index))

    def row(self, pieces: Sequence[Span]) -> NDArray[np.int64]:
        """The row that is made up of these stretches."""
        row, filled = np.zeros(self.order.seq_length + 1, np.int64), 0
        for document, start, length in pieces:
            row[filled : filled + length] = self.dataset.get(document, start, length)
            filled += length
        return row

    def documents_of(self, index: int) -> list[Span]:
        """The stretches of documents that make up the row served at place `index`, in order; no empty ones."""
        place, served = operator.index(index), self.order.shuffle_idx
        if not 0 <= place < len(served):
            raise IndexError(f"row {index} of {len(served)} in {self.dataset.prefix}")
        return [piece for piece in self.pieces(int(served[place])) if piece.length]

    @abstractmethod
    def pieces(self, row: int) -> list[Span]:
        """The stretches of a row, numbered as the order made it."""


class PackedDataset(DocumentRows[NeoxOrder]):
    """Rows of one stream of documents, cut every seq_length tokens: GPT-NeoX's packing."""

    def pieces(self, row: int) -> list[Span]:
        """From where row `row` of the stream begins to the first token of the next."""
        order = self.order
        (first, offset), (last, end) = (
            order.sample_idx[row].tolist(),
            order.sample_idx[row + 1].tolist(),
        )
        documents = order.doc_idx[first : last + 1]
        stops = self.dataset.sizes[documents].astype(np.int64)
        stops[-1] = end + 1  # the last token is the next row's first
        lengths = stops.copy()
        lengths[0] -= offset
        assert lengths.sum() == order.seq_length + 1, (row, lengths)
        starts = [offset] + [0] * (len(documents) - 1)
        return [
            Span(*piece) for piece in zip(documents.tolist(), starts, lengths.tolist(), strict=True)
        ]
