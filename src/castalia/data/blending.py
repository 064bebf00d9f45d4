"""The order in which several sources take turns: GPT-NeoX's greedy blend, exactly, without a compiler."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.data.order_cache import Maps, OrderCache, from_cache

VERSION = 1
"""Of the rule, in the key of kept index maps: another number whenever the same weights give other picks."""
Picks = NDArray[np.uint8 | np.uint16]
SMALL = 1 << 13
"""Up to this many rows a plain loop is as quick as lanes."""


def blend(weights: Sequence[float], size: int) -> tuple[Picks, NDArray[np.int64]]:
    """Which source serves each of `size` places, and which of its rows.

    Place s takes the source d with the largest w_d · max(s, 1) - (rows taken from d so far), in float64; the first
    source wins a tie. The rows of a source are taken in turn.

    Shapes  weights (K,) >= 0, made to sum to 1 -> dataset_index (size,) uint8 (uint16 from K = 255 up),
            sample_index (size,) int64.
    Time    about 2.5 ns · K a place, see `in_lanes`.
    Raises  ConfigError if the weights are negative or all 0.
    Source  megatron/data/blendable_dataset.py:28-90 and helpers.cpp:34-89 of GPT-NeoX.
    """
    shares = np.asarray(weights, dtype=np.float64)
    total = np.sum(shares)
    if (
        shares.ndim != 1
        or not len(shares)
        or not np.isfinite(total)
        or total <= 0
        or shares.min() < 0
    ):
        raise ConfigError(f"weights of a blend must be >= 0 and not all 0, got {list(weights)}")
    shares = shares / total
    if len(shares) == 1:
        return np.zeros(size, np.uint8), np.arange(size, dtype=np.int64)
    picks = in_turn(shares, size) if size <= SMALL else in_lanes(shares, size)
    return picks, numbered(picks, len(shares))


def blend_maps(weights: Sequence[float], size: int, cache: OrderCache | None = None) -> Maps:
    """What `blend` gives, as dataset_index and sample_index; from the cache where it is large."""

    def build() -> Maps:
        picks, numbers = blend(weights, size)
        return {"dataset_index": picks, "sample_index": numbers}

    key = {
        "order": "blend",
        "version": VERSION,
        "weights": [float(weight).hex() for weight in weights],
        "places": size,
    }
    return from_cache(cache, 9 * size, lambda: key, build)


def pick_dtype(sources: int) -> type[np.uint8 | np.uint16]:
    """uint8 while GPT-NeoX's limit of 254 sources holds, else uint16."""
    return np.uint8 if sources < 255 else np.uint16


def numbered(picks: Picks, sources: int) -> NDArray[np.int64]:
    """How many times each place's source was picked before it."""
    numbers = np.empty(len(picks), np.int64)
    for source in range(sources):
        places = np.flatnonzero(picks == source)
        numbers[places] = np.arange(len(places))
    return numbers


def in_turn(shares: NDArray[np.float64], size: int) -> Picks:
    """The rule as it is written, one place after the other."""
    taken = np.zeros(len(shares))
    picks = np.empty(size, pick_dtype(len(shares)))
    for place in range(size):
        picks[place] = pick = int((shares * max(place, 1) - taken).argmax())
        taken[pick] += 1
    return picks


def in_lanes(
    shares: NDArray[np.float64], size: int, *, length: int | None = None, warmup: int | None = None
) -> Picks:
    """The same picks, computed in many lanes of neighbouring places side by side.

    A lane's picks depend on the past only through the rows taken from each source before it. These are guessed, a
    few places ahead of the lane; the rule mends a wrong guess by itself within about 1/min(share) places. Then every
    lane's start is compared with its predecessor's end, and lanes that differ run again from there, until none
    does. Lane 0 starts exactly, so by induction all do: the result is exact, only the time rests on the guess.

    Time    O(K · size) in numpy steps over about sqrt(size) lanes, one or two passes; with shares far below
            1/sqrt(size) some lanes run again, in the worst case all in turn.
    """
    warmup = 256 + 32 * len(shares) if warmup is None else warmup
    length = max(math.isqrt(size), warmup) if length is None else length
    assert length >= warmup, (length, warmup)
    starts = np.arange(0, size, length)
    before = guess(shares, np.maximum(starts - warmup, 0))
    walk(
        shares,
        starts[1:] - warmup,
        before[:, 1:],
        np.empty((warmup, len(starts) - 1), pick_dtype(len(shares))),
    )
    before[:, 0] = 0
    after = before.copy()
    picks: Picks = np.empty((length, len(starts)), pick_dtype(len(shares)))
    walk(shares, starts, after, picks)
    while len(wrong := 1 + np.flatnonzero((before[:, 1:] != after[:, :-1]).any(axis=0))):
        before[:, wrong] = after[:, wrong - 1]
        again, made = before[:, wrong], np.empty((length, len(wrong)), pick_dtype(len(shares)))
        walk(shares, starts[wrong], again, made)
        after[:, wrong], picks[:, wrong] = again, made
    return np.ascontiguousarray(picks.T).reshape(-1)[:size]


def guess(shares: NDArray[np.float64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows taken before each of (S,) places, (K, S): one less than due for all but the largest source.

    What is overdue is picked at once; a row taken too early would wait for 1/share places to be forgotten.
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
    """Move each of S lanes on by `len(picks)` places; fills picks (places, S) and updates taken (K, S)."""
    lanes, due = np.arange(len(starts)), np.empty_like(taken)
    for step in range(len(picks)):
        np.multiply(shares[:, None], np.maximum(starts + step, 1).astype(np.float64), out=due)
        due -= taken
        picks[step] = pick = due.argmax(axis=0)
        taken[pick, lanes] += 1
