"""Keyed permutations and draws: pure functions of their keys, in memory independent of data size.

Source  SplitMix64's finalizer, Steele et al. 2014. Feistel networks on a power of two with cycle
        walking, Black & Rogaway 2002 ("Ciphers with arbitrary finite domains"). For shuffling, not
        for cryptography.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Places = NDArray[np.int64]
GOLDEN = 0x9E3779B97F4A7C15
"""SplitMix64's increment, 2**64 over the golden ratio (Steele et al. 2014)."""
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB
"""The multipliers of SplitMix64's finalizer."""
# The same constants as arrays, which cost numpy less than Python numbers.
SHIFT_30 = np.array(30, np.uint64)
SHIFT_27 = np.array(27, np.uint64)
SHIFT_31 = np.array(31, np.uint64)
TIMES_FIRST = np.array(FIRST, np.uint64)
TIMES_SECOND = np.array(SECOND, np.uint64)
MASK = (1 << 64) - 1
ROUNDS = 6
"""Pairs of Feistel rounds."""
SMALL = 16
"""Size up to which a source is ranked by hashes: Feistel orders are measurably uneven there."""
ROUND_KEYS = np.array([[number * GOLDEN & MASK] for number in range(2 * ROUNDS)], np.uint64)
HALF = np.array(32, np.uint64)


def mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit numbers that mixes all bits."""
    value &= MASK
    value = ((value ^ (value >> 30)) * FIRST) & MASK
    value = ((value ^ (value >> 27)) * SECOND) & MASK
    return value ^ (value >> 31)


def mix_all(values: Keys) -> Keys:
    """`mix` of every element."""
    out = values ^ (values >> SHIFT_30)
    out *= TIMES_FIRST
    out ^= out >> SHIFT_27
    out *= TIMES_SECOND
    out ^= out >> SHIFT_31
    return out


def number_of(text: str) -> int:
    """64 bits that identify a text, the same on every platform and Python version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def source_keys(seed: int, sources: Sequence[str]) -> Keys:
    """(K,) keys of the sources, each a function of seed and name alone.

    Adding a source therefore keeps the order within the others.
    """
    return np.array(
        [mix(number_of(name) + mix(seed) * GOLDEN) for name in sources], dtype=np.uint64
    )


def permute(places: Places, sizes: Places, keys: Keys) -> Places:
    """Apply the keyed permutation of 0..size-1 to each place.

    Each element has its own size >= 1 and key. For one size and key the map is a bijection. Time
    and memory depend only on the number of places. Up to size 16 the result is the rank of the
    place's hash among all hashes. Beyond, a Feistel network permutes the next power of two, applied
    again until the result is below the size; that takes two passes at most on average.

    Shapes  places, sizes (n,) int64, keys (n,) uint64 -> (n,) int64, in [0, size).
    Limits  sizes up to 2**53.
    """
    out = places.astype(np.uint64)
    limits = sizes.astype(np.uint64)
    small = np.flatnonzero(sizes <= SMALL)
    out[small] = rank(places[small], sizes[small], keys[small])
    # frexp is exact up to 2**53: the number of bits of size - 1.
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    one = np.uint64(1)
    right = (bits + one) >> one
    left_mask = (one << (bits - right)) - one
    right_mask = (one << right) - one
    # Cycle walking: at least half of the power of two is valid, so the rest soon dies out.
    todo = np.flatnonzero(sizes > SMALL)
    while len(todo):
        out[todo] = feistel(out[todo], right[todo], left_mask[todo], right_mask[todo], keys[todo])
        todo = todo[out[todo] >= limits[todo]]
    return out.astype(np.int64)


def rank(places: Places, sizes: Places, keys: Keys) -> Keys:
    """Rank of each place's hash among the hashes of 0..size-1, for size <= 16.

    The hashes differ from each other because `mix` is a bijection.
    """
    columns = np.arange(SMALL)
    hashes = mix_all(keys[:, None] + columns.astype(np.uint64) * np.uint64(GOLDEN))
    own = np.take_along_axis(hashes, places[:, None], axis=1)
    below: Keys = ((hashes < own) & (columns < sizes[:, None])).sum(axis=1).astype(np.uint64)
    return below


def feistel(values: Keys, right: Keys, left_mask: Keys, right_mask: Keys, keys: Keys) -> Keys:
    """A keyed permutation of the numbers with as many bits as both masks together."""
    left = values >> right
    low = values & right_mask
    for first, second in (keys + ROUND_KEYS).reshape(ROUNDS, 2, -1):
        left ^= mix_all(low + first) >> HALF & left_mask
        low ^= mix_all(left + second) >> HALF & right_mask
    return (left << right) | low


ONE = float(1 << 32)
"""Shares are counted in integer units of 2**-32, so that the last bits of a reduction do not change
the data."""


def quantise(shares: NDArray[np.float64]) -> Places:
    """Round shares to units of 2**-32, (K,) int64."""
    return np.rint(shares * ONE).astype(np.int64)


def resample(units: Places, rows: int, draw: int) -> Places:
    """Rows per source by systematic resampling: floor or ceiling of the expectation, unbiased.

    Source i gets floor(x + R C_i) - floor(x + R C_(i-1)) rows, where C is the cumulative sum of the
    shares and x is uniform in [0, 1), from the 64 bits of `draw`. The rows sum to R. Integer
    arithmetic makes the result the same on every machine.

    Shapes  units (K,) int64, not all 0 -> (K,) int64.
    Limits  rows * sum(units) < 2**63.
    Source  Kitagawa 1996, section A; Douc & Cappe 2005.
    """
    edges = units.cumsum()
    total = int(edges[-1])
    edges *= rows
    edges += (draw * total) >> 64
    edges //= total
    edges[1:] -= edges[:-1].copy()
    return edges
