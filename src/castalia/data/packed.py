"""Rows cut from one continuous stream of documents: GPT-NeoX's packing."""

import numpy as np
from numpy.typing import NDArray

from castalia.data.order import NeoxOrder
from castalia.data.row_source import DocumentSpan, RowSource
from castalia.data.span_table import SpanTable, bounds_of, runs


class PackedDataset(RowSource[NeoxOrder]):
    """Rows of the stream of all documents, cut every seq_length tokens."""

    def spans(self, row: int) -> list[DocumentSpan]:
        """From the start of row `row` in the stream through the first token of the next row."""
        order = self.order
        (first, offset), (last, end) = order.sample_idx[row : row + 2].tolist()
        documents = order.doc_idx[first : last + 1]
        stops = self.dataset.sizes[documents].astype(np.int64)
        stops[-1] = end + 1  # the row's last target is the next row's first token
        lengths = stops.copy()
        lengths[0] -= offset
        assert lengths.sum() == order.seq_length + 1, (row, lengths)
        starts = [offset] + [0] * (len(documents) - 1)
        fields = zip(documents.tolist(), starts, lengths.tolist(), strict=True)
        return [DocumentSpan(*span) for span in fields]

    def spans_of(self, rows: NDArray[np.int64]) -> SpanTable:
        """What `spans` gives for each of (n,) rows."""
        order = self.order
        first, offset = order.sample_idx[rows].astype(np.int64).T
        last, end = order.sample_idx[rows + 1].astype(np.int64).T
        counts = last - first + 1
        bounds = bounds_of(counts)
        documents = order.doc_idx[runs(first, counts)].astype(np.int64)
        starts = np.zeros(len(documents), np.int64)
        starts[bounds[:-1]] = offset
        stops = self.dataset.sizes[documents].astype(np.int64)
        stops[bounds[1:] - 1] = end + 1  # the row's last target is the next row's first token
        lengths = stops - starts
        assert (np.add.reduceat(lengths, bounds[:-1]) == order.seq_length + 1).all(), rows
        return SpanTable(bounds, documents, starts, lengths)
