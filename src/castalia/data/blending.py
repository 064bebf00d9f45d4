"""The order in which several sources take turns: GPT-NeoX's greedy blend, exactly, without a
compiler."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.data.order_cache import IndexMaps, OrderCache, from_cache

VERSION = 1
"""Version of the rule, part of the key of cached maps. Raise it whenever the same weights give
other picks."""
Picks = NDArray[np.uint8 | np.uint16]
SMALL = 1 << 13
"""Up to this many rows a plain loop is as fast as lanes."""


def blend(weights: Sequence[float], size: int) -> tuple[Picks, NDArray[np.int64]]:
    """The source that serves each of `size` places, and which of its rows.

    Place s takes the source d with the largest w_d · max(s, 1) - (rows taken from d so far), in
    float64; the first source wins a tie. The rows of a source are taken in turn. At place 1 a
    source of weight 0 ties with those whose row is taken, so the rule draws it once; `build_rows`
    leaves it out before (`sources.left_out`).

    Shapes  weights (K,) >= 0, normalised to sum to 1 -> dataset_index (size,) uint8 (uint16 from K
            = 255 on), sample_index (size,) int64.
    Time    about 2.5 ns · K per place, see `in_lanes`.
    Raises  ConfigError if a weight is negative, or all are 0.
    Source  megatron/data/blendable_dataset.py:28-90 and helpers.cpp:34-89 of GPT-NeoX.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.ndim != 1 or not len(shares):
        raise ConfigError(f"weights of a blend must be a list of numbers, got {list(weights)}")
    total = np.sum(shares)
    if not np.isfinite(total) or total <= 0 or shares.min() < 0:
        raise ConfigError(
            f"weights of a blend must be finite, >= 0 and not all 0, got {list(weights)}"
        )
    shares = shares / total
    if len(shares) == 1:
        return np.zeros(size, np.uint8), np.arange(size, dtype=np.int64)
    picks = in_turn(shares, size) if size <= SMALL else in_lanes(shares, size)
    return picks, row_numbers(picks, len(shares))


def blend_maps(weights: Sequence[float], size: int, cache: OrderCache | None = None) -> IndexMaps:
    """The result of `blend` as index maps; a large one comes from the cache."""

    def build() -> IndexMaps:
        picks, numbers = blend(weights, size)
        return {"dataset_index": picks, "sample_index": numbers}

    key = {
        "order": "blend",
        "version": VERSION,
        # Exactly, in hexadecimal: one bit of a weight may change a pick.
        "weights": [float(weight).hex() for weight in weights],
        "places": size,
    }
    # 1 byte per place in dataset_index, 8 in sample_index.
    return from_cache(cache, 9 * size, lambda: key, build)


def pick_dtype(sources: int) -> type[np.uint8 | np.uint16]:
    """uint8 up to GPT-NeoX's limit of 254 sources, else uint16."""
    return np.uint8 if sources < 255 else np.uint16


def row_numbers(picks: Picks, sources: int) -> NDArray[np.int64]:
    """How often each place's source was picked before it, (size,): the number of its row."""
    numbers = np.empty(len(picks), np.int64)
    for source in range(sources):
        places = np.flatnonzero(picks == source)
        numbers[places] = np.arange(len(places))
    return numbers


def in_turn(shares: NDArray[np.float64], size: int) -> Picks:
    """The rule as written, one place after the other."""
    taken = np.zeros(len(shares))
    picks = np.empty(size, pick_dtype(len(shares)))
    for place in range(size):
        pick = int((shares * max(place, 1) - taken).argmax())
        picks[place] = pick
        taken[pick] += 1
    return picks


def in_lanes(
    shares: NDArray[np.float64], size: int, *, length: int | None = None, warmup: int | None = None
) -> Picks:
    """The same picks, computed in many lanes of `length` consecutive places side by side.

    A lane's picks depend on earlier places only through the rows taken from each source. These are
    guessed `warmup` places ahead of the lane; the rule itself corrects a wrong guess within about
    1/min(share) places. Then each lane's start is compared with its predecessor's end, and lanes
    that differ run again from there, until none does. Lane 0 starts exactly, so by induction all
    do. The result is exact; only the time depends on the guess.

    Time    O(K · size) in numpy steps over about sqrt(size) lanes, in one or two passes. With
            shares far below 1/sqrt(size) some lanes run again, in the worst case all of them in
            turn.
    """
    if warmup is None:
        warmup = 256 + 32 * len(shares)
    if length is None:
        # sqrt(size) lanes of sqrt(size) places balance numpy's overhead against the lanes' memory.
        length = max(math.isqrt(size), warmup)
    assert length >= warmup, (length, warmup)
    dtype = pick_dtype(len(shares))
    starts = np.arange(0, size, length)
    before = guess(shares, np.maximum(starts - warmup, 0))
    discarded: Picks = np.empty((warmup, len(starts) - 1), dtype)
    walk(shares, starts[1:] - warmup, before[:, 1:], discarded)
    before[:, 0] = 0
    after = before.copy()
    picks: Picks = np.empty((length, len(starts)), dtype)
    walk(shares, starts, after, picks)
    while len(wrong := 1 + np.flatnonzero((before[:, 1:] != after[:, :-1]).any(axis=0))):
        before[:, wrong] = after[:, wrong - 1]
        taken = before[:, wrong]
        corrected: Picks = np.empty((length, len(wrong)), dtype)
        walk(shares, starts[wrong], taken, corrected)
        after[:, wrong] = taken
        picks[:, wrong] = corrected
    return np.ascontiguousarray(picks.T).reshape(-1)[:size]


def guess(shares: NDArray[np.float64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows taken before each of (S,) places, (K, S): one less than due but for the largest.

    An overdue row is picked at once, whereas the effect of a row taken too early lasts for 1/share
    places.
    """
    taken = np.maximum(np.floor(shares[:, None] * places) - 1, 0)
    taken[shares.argmax()] += places - taken.sum(axis=0)
    return taken


def walk(
    shares: NDArray[np.float64],
    starts: NDArray[np.int64],
    taken: NDArray[np.float64],
    picks: Picks,
) -> None:
    """Advance S lanes by `len(picks)` places: fills picks (places, S), updates taken (K, S)."""
    lanes = np.arange(len(starts))
    due = np.empty_like(taken)
    for step in range(len(picks)):
        # Multiply, then subtract, in float64: GPT-NeoX's order of operations decides ties.
        np.multiply(shares[:, None], np.maximum(starts + step, 1).astype(np.float64), out=due)
        due -= taken
        pick = due.argmax(axis=0)
        picks[step] = pick
        taken[pick, lanes] += 1
