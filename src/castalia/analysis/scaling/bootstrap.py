"""Replicates of a bootstrap over runs."""

from collections.abc import Sequence

import numpy as np

from castalia.analysis.scaling.checks import LEAST_VALUES
from castalia.analysis.scaling.law import Array, Law, Variable
from castalia.analysis.scaling.points import Point, column, groups

DRAWS = 20
"""Draws for each replicate at most."""
LEAST_RUNS = 3
"""Runs of a bootstrap; all draws of one run are the same, which would pass for certainty."""
INTERVAL = 0.95
"""Share of the replicates inside an interval."""


def draw_replicates(
    points: Sequence[Point], variables: tuple[Variable, ...], count: int, seed: int
) -> tuple[Array, int]:
    """How often each point counts in each replicate: runs are drawn with replacement.

    Runs and not points, since the points of a run are not independent: their order and start
    values are the same. A draw with too few sizes for the law is drawn again.

    Shapes   -> (R, S), R <= count, 0 for fewer than LEAST_RUNS runs; and the number of draws that
             could not be used.
    """
    runs = list(dict.fromkeys(point.run for point in points))
    of_point = np.array([runs.index(point.run) for point in points])
    generator = np.random.default_rng(seed)
    uniform = np.full(len(runs), 1 / len(runs))
    if len(runs) < LEAST_RUNS:
        return np.empty((0, len(points))), 0
    chosen: list[Array] = []
    refused = 0
    for _ in range(count * DRAWS):
        if len(chosen) == count:
            break
        weights = generator.multinomial(len(runs), uniform)[of_point].astype(np.float64)
        if holds(points, variables, weights):
            chosen.append(weights)
        else:
            refused += 1
    return np.array(chosen).reshape(len(chosen), len(points)), refused


def holds(points: Sequence[Point], variables: tuple[Variable, ...], weights: Array) -> bool:
    """Whether the points of a replicate are enough for the law."""
    drawn = [point for point, weight in zip(points, weights, strict=True) if weight]
    enough = len(drawn) >= 2 * len(variables) + 1
    return enough and all(len(groups(column(drawn, name))) >= LEAST_VALUES for name in variables)


def bounds(values: Array) -> tuple[Array, Array]:
    """The percentile interval over the first axis, (R, ...) -> (...) twice."""
    outside = (1 - INTERVAL) / 2
    # Order statistics, not interpolated ones: a coefficient may be inf in some replicates.
    low = np.quantile(values, outside, axis=0, method="lower")
    high = np.quantile(values, 1 - outside, axis=0, method="higher")
    return low, high


def spread(values: Array) -> float | None:
    """The standard error: standard deviation over the replicates; None where one is infinite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1))


def number_bounds(replicates: Law) -> dict[str, tuple[float, float]]:
    """The interval of each number of the law."""
    intervals: dict[str, tuple[float, float]] = {}
    for name in replicates.names:
        low, high = bounds(replicates.number(name))
        intervals[name] = (float(low), float(high))
    return intervals
