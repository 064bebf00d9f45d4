"""GPT-NeoX's packed sample order, exactly, in vectorised numpy: documents, rows and their shuffle.

Source  megatron/data/gpt2_dataset.py:189-413 and data_utils.py:242-285, 446-480 of GPT-NeoX. The random stream is
        numpy's frozen `RandomState`, so any numpy gives the same order.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.fingerprint import array_hash
from castalia.data.order_cache import Maps, OrderCache, from_cache

VERSION = 1
"""Of the algorithm, in the key of kept index maps: another number whenever the same settings give another order."""
PIECE = 1 << 20
"""Documents, and about rows, that are worked on at a time while the index is built."""
MARGIN = 1.005
"""Rows asked of each source over its share, so that blending never runs out (data_utils.py:281)."""


Fact = TypeVar("Fact", bound=np.generic)


class NeoxOrder:
    """Where each row of `seq_length` + 1 tokens begins, and in which order rows are served.

    All epochs' documents are shuffled together into one stream; row k is stream[k·L : k·L + L + 1], L = seq_length,
    so neighbours share a token; `shuffle_idx` then permutes the rows.

    Shapes  sizes (N,) tokens a document; documents (M,) the ones to use, all by default.
            doc_idx (M·epochs,) int32; sample_idx (n+1, 2) int32 or int64, pairs (place in doc_idx, offset);
            shuffle_idx (n,) uint32 or int64.
    Units   num_samples in rows; epochs is the least number of passes that holds them.
    Memory  that of the maps and about 0.1 GB; with `cache`, pages of its file.
    Raises  DataError if the documents hold fewer tokens than seq_length.
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
        own, used = chosen(all_sizes, documents)
        self.seq_length, self.seed = seq_length, seed
        self.tokens_per_epoch = int(own.sum(dtype=np.int64))
        self.epochs = epochs = epochs_for(self.tokens_per_epoch, len(own), seq_length, num_samples)
        rows = (epochs * self.tokens_per_epoch - 1) // seq_length
        numbers = {"seq_length": seq_length, "epochs": epochs, "seed": seed}
        self.maps = from_cache(
            cache,
            4 * epochs * len(own) + 12 * rows,
            lambda: {"order": "packed", "version": VERSION, **numbers, **content(own, used)},
            lambda: packed_maps(
                all_sizes, used, seq_length, epochs, epochs * self.tokens_per_epoch, seed
            ),
        )

    @property
    def doc_idx(self) -> NDArray[np.int32]:
        """Documents of all epochs in the order of the stream."""
        return self.maps["doc_idx"]

    @property
    def sample_idx(self) -> NDArray[np.int32] | NDArray[np.int64]:
        """Where each row of the stream begins."""
        return self.maps["sample_idx"]

    @property
    def shuffle_idx(self) -> NDArray[np.uint32] | NDArray[np.int64]:
        """The row of the stream that each place serves."""
        return self.maps["shuffle_idx"]

    def __len__(self) -> int:
        """Rows less one, as GPT-NeoX counts (gpt2_dataset.py:81-90): the period of what wraps around."""
        return len(self.shuffle_idx) - 1

    def wrap(self, index: int) -> int:
        """The place served for any place >= 0: itself while a row is there, else modulo `len`, as GPT-NeoX does."""
        return index if index < len(self.shuffle_idx) else index % max(len(self), 1)


def chosen(
    facts: NDArray[Fact], documents: ArrayLike | range | None
) -> tuple[NDArray[Fact], range | NDArray[np.int32]]:
    """What is known of each document, such as its size, for the ones to use, and these: all unless they are given.

    Of neighbours it is a view.
    """
    documents = range(len(facts)) if documents is None else documents
    if isinstance(documents, range) and documents.step == 1:
        return facts[documents.start : documents.stop], documents
    used = np.asarray(documents, np.int32)
    return facts[used], used


def numbered(used: range | NDArray[np.int32]) -> NDArray[np.int32]:
    """The documents to use as an array."""
    return np.arange(used.start, used.stop, dtype=np.int32) if isinstance(used, range) else used


def content(own: NDArray[np.integer], used: range | NDArray[np.int32]) -> dict[str, Any]:
    """What the data add to the key of an order: hashes of what `chosen` gives."""
    documents = [used.start, used.stop] if isinstance(used, range) else array_hash(used)
    return {"sizes": array_hash(own), "documents": documents}


def packed_maps(
    sizes: NDArray[np.integer],
    used: range | NDArray[np.int32],
    seq_length: int,
    epochs: int,
    total: int,
    seed: int,
) -> Maps:
    """The maps of `NeoxOrder`, over `total` tokens in `epochs` passes."""
    random, rows = np.random.RandomState(seed), (total - 1) // seq_length
    doc_idx = np.tile(numbered(used), epochs)
    random.shuffle(doc_idx)
    sample_idx = place_rows(sizes, doc_idx, seq_length, rows, total)
    shuffle_idx = np.arange(rows, dtype=np.uint32 if rows < 2**32 - 2 else np.int64)
    random.shuffle(shuffle_idx)
    return {"doc_idx": doc_idx, "sample_idx": sample_idx, "shuffle_idx": shuffle_idx}


def epochs_for(tokens: int, documents: int, seq_length: int, num_samples: int) -> int:
    """Least number of passes >= 1 over `tokens` that holds `num_samples` rows: min e with (e·T - 1) // L >= S."""
    if tokens < seq_length or tokens == 0:
        raise DataError(
            f"a row needs {seq_length + 1} tokens, but the {documents} documents hold {tokens} in all;"
            " take a shorter data.seq_length or more text"
        )
    return max(1, -(-(num_samples * seq_length + 1) // tokens))


def place_rows(
    sizes: NDArray[np.integer], doc_idx: NDArray[np.int32], seq_length: int, rows: int, total: int
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Where rows 0..n start: the document whose tokens cover stream place k·L, and the offset in it.

    Shapes  sizes (N,), doc_idx (D,) -> (rows + 1, 2), int32 under GPT-NeoX's rule, else int64.
    Time    O(D + rows), in pieces, so that the temporary memory stays below about 100 MB.
    """
    wide = 2 * ((total - 1) / seq_length + 1) >= np.iinfo(np.int32).max
    places = np.zeros((rows + 1, 2), dtype=np.int64 if wide else np.int32)
    step = max(1, min(PIECE, PIECE * len(doc_idx) // (rows + 1)))
    begin, k = 0, 0
    for first in range(0, len(doc_idx), step):
        ends = begin + np.cumsum(sizes[doc_idx[first : first + step]], dtype=np.int64)
        covered = np.minimum((ends - 1) // seq_length, rows) + 1  # how many k have k·L < ends
        counts = np.diff(covered, prepend=k)
        starts = np.concatenate(([begin], ends[:-1]))
        stop = int(covered[-1])
        places[k:stop, 0] = np.repeat(np.arange(first, first + len(ends)), counts)
        places[k:stop, 1] = np.arange(k, stop) * seq_length - np.repeat(starts, counts)
        begin, k = int(ends[-1]), stop
    assert k == rows + 1, (k, rows)
    places[0] = 0  # GPT-NeoX starts at document 0 even if that is empty
    return places


def split_documents(split: str, documents: int) -> tuple[range, range, range]:
    """Documents of train, valid and test under shares such as `969, 30, 1` or `98/1/1`.

    Rounding is Python's (half to even) and what is over or missing moves all three ends (data_utils.py:242-266); an
    end that this moves below 0 stays at 0, where GPT-NeoX would read documents from the back.
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
    over = ends[-1] - documents
    ends = [0, *(min(max(end - over, 0), documents) for end in ends[1:])]
    return range(ends[0], ends[1]), range(ends[1], ends[2]), range(ends[2], ends[3])


def rows_per_source(weights: Sequence[float], rows: int) -> list[int]:
    """Rows that each source of a blend must hold: ceil(rows · share · 1.005), even for a single source."""
    total = sum(weights)
    return [math.ceil(rows * (weight / total) * MARGIN) for weight in weights]


def weight_by_num_documents(counts: Sequence[int], alpha: float) -> list[float]:
    """Blend weights from documents a source: p ∝ share^alpha, weight ∝ p · (1 - share), summing to 1.

    Source  data_utils.py:446-480 of GPT-NeoX; the exponent is that of Conneau et al. 2019, arXiv:1911.02116.
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
