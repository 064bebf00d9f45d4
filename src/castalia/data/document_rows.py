"""The documents of a token file as rows, one by one in the order of the file."""

from castalia.data.indexed import IndexedDataset
from castalia.data.row_source import DocumentSpan, RowSource


class DocumentOrder:
    """Every document once, from the first again after the last."""

    epochs = 1

    def __init__(self, documents: int, seq_length: int, tokens: int) -> None:
        self.seq_length = seq_length
        self.tokens_per_epoch = tokens
        self.shuffle_idx = range(documents)

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def wrap(self, index: int) -> int:
        """The document served at any place >= 0."""
        return index % len(self)


class DocumentRows(RowSource[DocumentOrder]):
    """One document a row, without its end where it is longer."""

    scattered = False
    padded = True

    @classmethod
    def of(cls, dataset: IndexedDataset, seq_length: int) -> "DocumentRows":
        """The documents of a file."""
        tokens = int(dataset.sizes.sum(dtype="int64"))
        return cls(dataset, DocumentOrder(len(dataset), seq_length, tokens))

    def spans(self, row: int) -> list[DocumentSpan]:
        """The document."""
        length = min(int(self.dataset.sizes[row]), self.order.seq_length + 1)
        return [DocumentSpan(row, 0, length)]
