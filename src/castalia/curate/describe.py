"""Statistics of a token file: counts, lengths, and the distribution of the lengths."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castalia.data.indexed import IndexedDataset
from castalia.data.order_cache import SUFFIX, kept_files


@dataclass(frozen=True)
class Description:
    """Statistics of a token file. Lengths are in tokens a document."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    bytes: int
    """Size of the .bin, or of its shards together."""
    shards: int
    """0 for a whole .bin."""
    empty: int
    """Documents without a token."""
    shortest: int
    mean: float
    median: float
    longest: int
    histogram: list[tuple[int, int]]
    """(least length, documents) for each power of two; a bucket ends where the next begins."""
    maps: int
    """Cached index maps beside the token file."""
    maps_bytes: int


def describe(dataset: IndexedDataset) -> Description:
    """Statistics of a token file, computed from its .idx alone."""
    sizes = dataset.sizes
    tokens = int(sizes.sum(dtype=np.int64))
    shortest = 0
    median = 0.0
    longest = 0
    if len(sizes):
        shortest = int(sizes.min())
        median = float(np.median(sizes))
        longest = int(sizes.max())
    maps, maps_bytes = kept_files(Path(dataset.prefix + SUFFIX))
    return Description(
        prefix=dataset.prefix,
        documents=len(dataset),
        tokens=tokens,
        dtype=dataset.dtype.name,
        bytes=len(dataset.buffer),
        shards=len(dataset.shards),
        empty=int((sizes == 0).sum()),
        shortest=shortest,
        mean=tokens / max(len(dataset), 1),
        median=median,
        longest=longest,
        histogram=histogram(sizes),
        maps=maps,
        maps_bytes=maps_bytes,
    )


def histogram(sizes: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Documents by length, as (least length, documents).

    The first bucket, 0, holds documents without a token; bucket 2^k holds those of 2^k to
    2^(k+1) - 1 tokens. Empty buckets between used ones are listed, those outside are not.
    """
    if not len(sizes):
        return []
    edges = [0, *(2**k for k in range(int(sizes.max()).bit_length() + 1))]
    counts, _ = np.histogram(sizes, edges)
    used = np.flatnonzero(counts)
    return [(edges[i], int(counts[i])) for i in range(int(used[0]), int(used[-1]) + 1)]
