"""Token ids beyond the model's vocabulary: a scan of a whole file, and the error."""

import numpy as np

from castalia.core.errors import DataError
from castalia.data.indexed import CHECK_BLOCK, IndexedDataset


def check_vocab(dataset: IndexedDataset, vocab_size: int, most_bytes: int | None = None) -> None:
    """Scan a token file of up to `most_bytes` (None: any size) for ids outside [0, vocab_size).

    Time    one pass over the .bin, about 1 s per GB. The loader checks every batch as well.
    Raises  DataError naming the file, the document and the id.
    """
    if most_bytes is not None and len(dataset.buffer) > most_bytes:
        return
    # A mapping of its own, with read-ahead: the loader's is set up for reads in random order.
    dataset = IndexedDataset(dataset.prefix)
    width = dataset.dtype.itemsize
    total = len(dataset.buffer) // width
    for start in range(0, total, CHECK_BLOCK):
        count = min(CHECK_BLOCK, total - start)
        ids = dataset.buffer.view(dataset.dtype, count, start * width)
        if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
            continue
        first_bad = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        document = document_at(dataset, (start + first_bad) * width)
        raise DataError(out_of_vocab(dataset.prefix, document, int(ids[first_bad]), vocab_size))


def document_at(dataset: IndexedDataset, byte: int) -> int:
    """The document that covers a byte of the .bin; -1 if none does."""
    ends = dataset.pointers + dataset.sizes.astype(np.int64) * dataset.dtype.itemsize
    covering = np.flatnonzero((dataset.pointers <= byte) & (byte < ends))
    return int(covering[0]) if len(covering) else -1


def out_of_vocab(prefix: str, document: int, token: int, vocab_size: int) -> str:
    """The error text for a token id that the model does not have."""
    return (
        f"{prefix}: document {document} has token id {token}, but the model's vocabulary has"
        f" {vocab_size} ids; prepare the text with the model's tokenizer, or set model.vocab_size"
    )
