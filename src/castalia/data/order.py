"""GPT-NeoX's packed sample order, exactly, in vectorised numpy: documents, rows and their shuffle.

Source  megatron/data/gpt2_dataset.py:189-413 and data_utils.py:242-285, 446-480 of GPT-NeoX. The
        random stream is numpy's frozen `RandomState`, so every version of numpy gives the same
        order.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.compiled_order import place_rows_compiled, shuffle
from castalia.data.fingerprint import array_hash
from castalia.data.order_cache import IndexMaps, OrderCache, from_cache

VERSION = 1
"""Version of the algorithm, part of the key of cached maps. Raise it whenever the same settings
give another order."""
BLOCK = 1 << 20
"""Documents, and about as many rows, processed at a time, which bounds the temporary memory."""
MARGIN = 1.005
"""Rows requested from each source, relative to its share, so that a blend never runs out
(data_utils.py:281)."""

Value = TypeVar("Value", bound=np.generic)
DocumentNumbers = range | NDArray[np.int32]


class NeoxOrder:
    """Where each row of `seq_length` + 1 tokens begins, and the order in which rows are served.

    The documents of all epochs are shuffled together into one stream. Row k is
    stream[k·L : k·L + L + 1] with L = seq_length, so neighbours share a token. `shuffle_idx` then
    permutes the rows.

    Shapes  sizes (N,) tokens per document; documents (M,) the ones to use, all by default.
            doc_idx (M·epochs,) int32; sample_idx (n+1, 2) int32 or int64, pairs (place in doc_idx,
            offset in the document); shuffle_idx (n,) uint32 or int64.
    Units   num_samples in rows; epochs is the smallest number of passes that holds them.
    Memory  the maps and about 0.1 GB; with `cache`, the maps are pages of its file.
    Raises  DataError if the documents hold fewer than seq_length tokens.
    """

    def __init__(
        self,
        sizes: ArrayLike,
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        documents: ArrayLike | range | None = None,
        cache: OrderCache | None = None,
    ) -> None:
        all_sizes = np.asarray(sizes)
        own_sizes, numbers = select(all_sizes, documents)
        self.seq_length = seq_length
        self.seed = seed
        self.tokens_per_epoch = int(own_sizes.sum(dtype=np.int64))
        self.epochs = epochs_for(self.tokens_per_epoch, len(own_sizes), seq_length, num_samples)
        total = self.epochs * self.tokens_per_epoch
        rows = (total - 1) // seq_length

        def key() -> dict[str, Any]:
            settings = {"seq_length": seq_length, "epochs": self.epochs, "seed": seed}
            data = data_key(own_sizes, numbers)
            return {"order": "packed", "version": VERSION, **settings, **data}

        def build() -> IndexMaps:
            return packed_maps(all_sizes, numbers, seq_length, self.epochs, total, seed)

        # 4 bytes per document in doc_idx; per row, 8 in sample_idx and 4 in shuffle_idx.
        size = 4 * self.epochs * len(own_sizes) + 12 * rows
        self.maps = from_cache(cache, size, key, build)

    @property
    def doc_idx(self) -> NDArray[np.int32]:
        """The documents of all epochs, in the order of the stream."""
        return self.maps["doc_idx"]

    @property
    def sample_idx(self) -> NDArray[np.int32] | NDArray[np.int64]:
        """Where each row of the stream begins: place in `doc_idx` and offset in that document."""
        return self.maps["sample_idx"]

    @property
    def shuffle_idx(self) -> NDArray[np.uint32] | NDArray[np.int64]:
        """The row of the stream served at each place."""
        return self.maps["shuffle_idx"]

    def __repr__(self) -> str:
        rows = f"{len(self.shuffle_idx):,} rows of {self.seq_length} tokens"
        return f"{type(self).__name__}({rows}, {self.epochs} epochs, seed {self.seed})"

    def __len__(self) -> int:
        """The period after which places repeat: rows less one, as in GPT-NeoX
        (gpt2_dataset.py:81-90)."""
        return len(self.shuffle_idx) - 1

    def wrap(self, index: int) -> int:
        """The place served for any place >= 0: itself where a row exists, else modulo `len`, as in
        GPT-NeoX."""
        if index < len(self.shuffle_idx):
            return index
        return index % max(len(self), 1)


def select(
    values: NDArray[Value], documents: ArrayLike | range | None
) -> tuple[NDArray[Value], DocumentNumbers]:
    """The values of the documents to use, and their numbers; all of them by default.

    Shapes  values (N,), one per document, such as its size; documents (M,) -> (M,), numbers (M,).
            A range of neighbours gives a view.
    """
    if documents is None:
        documents = range(len(values))
    if isinstance(documents, range) and documents.step == 1:
        return values[documents.start : documents.stop], documents
    numbers = np.asarray(documents, np.int32)
    return values[numbers], numbers


def as_array(numbers: DocumentNumbers) -> NDArray[np.int32]:
    """Document numbers as an array."""
    if isinstance(numbers, range):
        return np.arange(numbers.start, numbers.stop, dtype=np.int32)
    return numbers


def data_key(sizes: NDArray[np.integer], numbers: DocumentNumbers) -> dict[str, Any]:
    """The data's part of an order's cache key: hashes of the two results of `select`."""
    documents: Any
    if isinstance(numbers, range):
        documents = [numbers.start, numbers.stop]
    else:
        documents = array_hash(numbers)
    return {"sizes": array_hash(sizes), "documents": documents}


def packed_maps(
    sizes: NDArray[np.integer],
    numbers: DocumentNumbers,
    seq_length: int,
    epochs: int,
    total: int,
    seed: int,
) -> IndexMaps:
    """The maps of `NeoxOrder`, over `total` tokens in `epochs` passes."""
    random = np.random.RandomState(seed)
    rows = (total - 1) // seq_length
    # Documents before rows: both draw from one random stream, in GPT-NeoX's order.
    doc_idx = np.tile(as_array(numbers), epochs)
    shuffle(random, doc_idx)
    sample_idx = place_rows(sizes, doc_idx, seq_length, rows, total)
    # GPT-NeoX's rule for the dtype. The shuffle itself does not depend on it.
    shuffle_idx = np.arange(rows, dtype=np.uint32 if rows < 2**32 - 2 else np.int64)
    shuffle(random, shuffle_idx)
    return {"doc_idx": doc_idx, "sample_idx": sample_idx, "shuffle_idx": shuffle_idx}


def epochs_for(tokens: int, documents: int, seq_length: int, num_samples: int) -> int:
    """The smallest number of passes that holds S = num_samples rows.

    That is the smallest e >= 1 with (e·T - 1) // L >= S, where T is `tokens`, the tokens of one
    pass, and L is seq_length.
    Raises  DataError if the documents hold fewer than L tokens.
    """
    if tokens < seq_length or tokens == 0:
        raise DataError(
            f"a row needs {seq_length + 1} tokens, but the {documents} documents hold {tokens} in"
            " all; use a shorter data.seq_length or more text"
        )
    return max(1, -(-(num_samples * seq_length + 1) // tokens))


def place_rows(
    sizes: NDArray[np.integer], doc_idx: NDArray[np.int32], seq_length: int, rows: int, total: int
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Where rows 0..n start: the document that covers stream place k·L, and the offset in it.

    Shapes  sizes (N,), doc_idx (D,) -> (rows + 1, 2), int32 under GPT-NeoX's rule, else int64.
    Time    O(D + rows), in blocks that keep the temporary memory below about 100 MB.
    """
    wide = 2 * ((total - 1) / seq_length + 1) >= np.iinfo(np.int32).max
    starts = np.zeros((rows + 1, 2), dtype=np.int64 if wide else np.int32)
    if place_rows_compiled(sizes, doc_idx, seq_length, starts):
        starts[0] = 0
        return starts
    # A block is limited by its documents or by its rows, whichever there are more of.
    step = max(1, min(BLOCK, BLOCK * len(doc_idx) // (rows + 1)))
    begin = 0  # stream place of the block's first token
    row = 0  # the first row that starts in the block
    for first in range(0, len(doc_idx), step):
        ends = begin + np.cumsum(sizes[doc_idx[first : first + step]], dtype=np.int64)
        started = np.minimum((ends - 1) // seq_length, rows) + 1  # how many k have k·L < ends
        rows_in_document = np.diff(started, prepend=row)
        begins = np.concatenate(([begin], ends[:-1]))
        stop = int(started[-1])
        starts[row:stop, 0] = np.repeat(np.arange(first, first + len(ends)), rows_in_document)
        offsets = np.arange(row, stop) * seq_length - np.repeat(begins, rows_in_document)
        starts[row:stop, 1] = offsets
        begin = int(ends[-1])
        row = stop
    assert row == rows + 1, (row, rows)
    starts[0] = 0  # GPT-NeoX starts at document 0 even if that is empty
    return starts


def split_documents(split: str, documents: int) -> tuple[range, range, range]:
    """The documents of train, valid and test under shares such as `969, 30, 1` or `98/1/1`.

    Rounding is Python's, half to even. The surplus or deficit of all three shifts every end
    (data_utils.py:242-266). An end shifted below 0 stays at 0, where GPT-NeoX would count documents
    from the back.
    Raises  ConfigError if the shares are not numbers >= 0 with a positive sum.
    """
    parts = split.split("," if "," in split else "/")
    try:
        shares = [float(part) for part in parts if part.strip()]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares[:3]) < math.inf:
        raise ConfigError(
            f"data.split {split!r}: expected shares of train, valid and test such as '969, 30, 1'"
        )
    shares = [*shares, 0.0, 0.0][:3]
    total = sum(shares)
    ends = [0]
    for share in shares:
        ends.append(ends[-1] + round(share / total * float(documents)))
    surplus = ends[-1] - documents
    train, valid, test = (min(max(end - surplus, 0), documents) for end in ends[1:])
    return range(train), range(train, valid), range(valid, test)


def rows_per_source(weights: Sequence[float], rows: int) -> list[int]:
    """Rows that each source of a blend, even a single one, must hold: ceil(rows·share·1.005)."""
    total = sum(weights)
    return [math.ceil(rows * (weight / total) * MARGIN) for weight in weights]


def weight_by_num_documents(counts: Sequence[int], alpha: float) -> list[float]:
    """Blend weights from the number of documents of each source, summing to 1.

    With share s of the documents, p ∝ s^alpha and weight ∝ p · (1 - s).
    Source  data_utils.py:446-480 of GPT-NeoX; the exponent is that of Conneau et al. 2019,
            arXiv:1911.02116.
    """
    if len(counts) == 1:
        return [1.0]
    total = sum(counts)
    shares = [count / total for count in counts]
    powers = [share**alpha for share in shares]
    norm = sum(powers)
    raw = [power / norm * (1 - share) for power, share in zip(powers, shares, strict=True)]
    norm = sum(raw)
    return [value / norm for value in raw]
