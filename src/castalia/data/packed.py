"""Rows cut from one continuous stream of documents: GPT-NeoX's packing."""

import numpy as np

from castalia.data.order import NeoxOrder
from castalia.data.row_source import DocumentSpan, RowSource


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
