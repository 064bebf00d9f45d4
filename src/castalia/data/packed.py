"""Rows of tokens out of a token file, in GPT-NeoX's order, and the documents that each row came from."""

import operator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.order import NeoxOrder


class Piece(NamedTuple):
    """A stretch of one document: tokens [start, start + length) of document `document`."""

    document: int
    start: int
    length: int


class PackedDataset:
    """The rows of `dataset` under `order`: `packed[i]` is the row served at place i, (seq_length + 1,) int64.

    Raises  IndexError for a place without a row (`order.wrap` says what GPT-NeoX serves there); DataError if the
            file holds floats.
    """

    def __init__(self, dataset: IndexedDataset, order: NeoxOrder) -> None:
        require_tokens(dataset)
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        row = np.empty(self.order.seq_length + 1, np.int64)
        filled = 0
        for document, start, length in self.documents_of(index):
            row[filled : filled + length] = self.dataset.get(document, start, length)
            filled += length
        assert filled == len(row), (index, filled)
        return row

    def documents_of(self, index: int) -> list[Piece]:
        """The stretches of documents that make up the row served at place `index`, in order; no empty ones."""
        place, order = operator.index(index), self.order
        if not 0 <= place < len(order.shuffle_idx):
            raise IndexError(f"row {index} of {len(order.shuffle_idx)} in {self.dataset.prefix}")
        k = int(order.shuffle_idx[place])
        (first, offset), (last, end) = order.sample_idx[k].tolist(), order.sample_idx[k + 1].tolist()
        documents = order.doc_idx[first : last + 1]
        stops = self.dataset.sizes[documents].astype(np.int64)
        stops[-1] = end + 1  # the last token is the next row's first
        lengths = stops.copy()
        lengths[0] -= offset
        starts = [offset] + [0] * (len(documents) - 1)
        found = zip(documents.tolist(), starts, lengths.tolist(), strict=True)
        return [Piece(*piece) for piece in found if piece[2]]
