"""Keyed permutations and draws: pure functions of their keys, with no state and no memory of the size of the data.

Source  SplitMix64's finalizer, Steele et al. 2014; Feistel networks on a power of two with cycle walking, Black &
        Rogaway 2002 ("Ciphers with arbitrary finite domains"). Not cryptography: shuffling.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Places = NDArray[np.int64]
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64."""
SHIFT_30, SHIFT_27, SHIFT_31, TIMES_FIRST, TIMES_SECOND = (
    np.array(number, np.uint64) for number in (30, 27, 31, FIRST, SECOND)
)
"""As arrays, which cost numpy less than numbers do."""
MASK = (1 << 64) - 1
ROUNDS, SMALL = 6, 16
"""Pairs of Feistel rounds, and the size up to which their orders would still be measurably uneven."""
ROUND_KEYS = np.array([[number * GOLDEN & MASK] for number in range(2 * ROUNDS)], np.uint64)
HALF = np.array(32, np.uint64)


def mix(value: int) -> int:
    """SplitMix64's finalizer of one number: 64 bits in, 64 well-mixed bits out, one to one."""
    value &= MASK
    value = ((value ^ (value >> 30)) * FIRST) & MASK
    value = ((value ^ (value >> 27)) * SECOND) & MASK
    return value ^ (value >> 31)


def mix_all(values: Keys) -> Keys:
    """`mix` of every number."""
    out = values ^ (values >> SHIFT_30)
    out *= TIMES_FIRST
    out ^= out >> SHIFT_27
    out *= TIMES_SECOND
    out ^= out >> SHIFT_31
    return out


def number_of(text: str) -> int:
    """64 bits that stand for a text, the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def source_keys(seed: int, sources: Sequence[str]) -> Keys:
    """A key for each source, by its name: other sources do not change it."""
    return np.array(
        [mix(number_of(name) + mix(seed) * GOLDEN) for name in sources], dtype=np.uint64
    )


def permute(places: Places, sizes: Places, keys: Keys) -> Places:
    """Where the keyed permutation of 0..size-1 sends each place.

    Each element has a size >= 1 and a key of its own; for one size and key the map is one to one. Time and memory
    depend on the number of places alone. Up to 16 it is the rank of one hash among the hashes of all places; beyond,
    a place is mapped within the next power of two, again until it falls below the size: twice at most on average.

    Shapes  places, sizes (n,) int64, keys (n,) uint64 -> (n,) int64, in [0, size).
    Limits  sizes up to 2**53.
    """
    out, limits = places.astype(np.uint64), sizes.astype(np.uint64)
    small = np.flatnonzero(sizes <= SMALL)
    out[small] = rank(places[small], sizes[small], keys[small])
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    one = np.uint64(1)
    right = (bits + one) >> one
    left_mask, right_mask = (one << (bits - right)) - one, (one << right) - one
    todo = np.flatnonzero(sizes > SMALL)
    while len(todo):
        out[todo] = feistel(out[todo], right[todo], left_mask[todo], right_mask[todo], keys[todo])
        todo = todo[out[todo] >= limits[todo]]
    return out.astype(np.int64)


def rank(places: Places, sizes: Places, keys: Keys) -> Keys:
    """Each place's rank in the order of the hashes of 0..size-1, which are all different; size <= 16."""
    columns = np.arange(SMALL)
    hashes = mix_all(keys[:, None] + columns.astype(np.uint64) * np.uint64(GOLDEN))
    own = np.take_along_axis(hashes, places[:, None], axis=1)
    below: Keys = ((hashes < own) & (columns < sizes[:, None])).sum(axis=1).astype(np.uint64)
    return below


def feistel(values: Keys, right: Keys, left_mask: Keys, right_mask: Keys, keys: Keys) -> Keys:
    """A keyed permutation of the numbers of as many bits as both masks have together."""
    left, low = values >> right, values & right_mask
    for first, second in (keys + ROUND_KEYS).reshape(ROUNDS, 2, -1):
        left ^= mix_all(low + first) >> HALF & left_mask
        low ^= mix_all(left + second) >> HALF & right_mask
    return (left << right) | low


ONE = float(1 << 32)
"""Shares are counted in units of 2**-32, so that the last bits of a reduction do not change the data."""


def quantise(shares: NDArray[np.float64]) -> Places:
    """Shares in whole units of 2**-32, (K,) int64."""
    return np.rint(shares * ONE).astype(np.int64)


def resample(units: Places, rows: int, draw: int) -> Places:
    """Rows per source by systematic resampling: floor or ceiling of the expectation, right on average.

    Source i gets floor(x + R C_i) - floor(x + R C_(i-1)), C the running sum of the shares and x uniform in [0, 1) out
    of the 64 bits of `draw`; in whole numbers, so every machine finds the same. The rows sum to R.

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
