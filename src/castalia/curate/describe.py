"""What is in a token file: counts, lengths, and how the lengths are spread."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from castalia.data.indexed import IndexedDataset
from castalia.data.order_cache import SUFFIX, kept_files


@dataclass(frozen=True)
class Description:
    """Counts of a token file. Lengths are tokens a document; `histogram` has a pair (least length, documents) for each
    power of two, a bucket reaching to the next one; `maps` and `maps_bytes` are the kept index maps beside it."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    bytes: int
    shards: int
    empty: int
    shortest: int
    mean: float
    median: float
    longest: int
    histogram: list[tuple[int, int]]
    maps: int
    maps_bytes: int


def describe(dataset: IndexedDataset) -> Description:
    """Counts and lengths of a token file; of the two files it reads the .idx only."""
    sizes, some = dataset.sizes, len(dataset) > 0
    tokens = int(sizes.sum(dtype=np.int64))
    maps, maps_bytes = kept_files(Path(dataset.prefix + SUFFIX))
    return Description(
        prefix=dataset.prefix,
        documents=len(dataset),
        tokens=tokens,
        dtype=dataset.dtype.name,
        bytes=len(dataset.buffer),
        shards=len(dataset.shards),
        empty=int((sizes == 0).sum()),
        shortest=int(sizes.min()) if some else 0,
        mean=tokens / max(len(dataset), 1),
        median=float(np.median(sizes)) if some else 0.0,
        longest=int(sizes.max()) if some else 0,
        histogram=histogram(sizes),
        maps=maps,
        maps_bytes=maps_bytes,
    )


def histogram(sizes: "np.typing.NDArray[np.int32]") -> list[tuple[int, int]]:
    """Documents by length: (0, those without a token), then (2^k, those of 2^k to 2^(k+1) - 1 tokens), no gaps."""
    if not len(sizes):
        return []
    edges = [0, *(2**k for k in range(int(sizes.max()).bit_length() + 1))]
    counts, _ = np.histogram(sizes, edges)
    used = np.flatnonzero(counts)
    return [(edges[i], int(counts[i])) for i in range(int(used[0]), int(used[-1]) + 1)]
