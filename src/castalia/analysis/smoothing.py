"""Smoothing without lag: local linear regression over the logarithm of the step.

A trailing mean lies above a falling curve, by the slope times its lag. A linear fit around each
point has no bias on a straight line, in the middle of the curve and at its ends. A loss falls
roughly as a power of the step, so that it is straightest, and the window fits best, on a
logarithmic scale.

Source  Cleveland 1979, doi:10.1080/01621459.1979.10481038 (the tricube weights); Fan and Gijbels
        1996, Local Polynomial Modelling and Its Applications, section 3.2 (the bias at the ends).
"""

import math

import numpy as np
from numpy.typing import NDArray

from castalia.analysis.runs import Vector

WINDOWS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Half-widths that the page's slider offers, as shares of the step: at step 1000, 0.05 spans the
steps 950 to 1050."""
ENDING = 0.05
"""Half-width of the fit that gives the final value of a curve."""
LEAST = 10
"""Points behind a final value at the least, where the curve has as many."""


def local_linear(steps: Vector, values: Vector, window: float) -> tuple[Vector, Vector]:
    """The smoothed curve, at places no further apart than a quarter of the window.

    steps   (S,) ascending.
    values  (S,) finite.
    window  half-width of the weights' support, as a share of the step.

    Shapes  -> (M,) steps and (M,) values, M <= S.
    """
    places = spaced(steps, window / 4)
    return steps[places], fits_at(places, steps, values, window)


def fits_at(
    places: NDArray[np.int64], steps: Vector, values: Vector, window: float
) -> NDArray[np.float64]:
    """The smoothed values at some places of a curve, by their index."""
    scale = log_steps(steps)
    width = math.log1p(window)
    centers = scale[places]
    # The windows of all places at once; a mask a place would be S x M comparisons.
    firsts = np.searchsorted(scale, centers - width, "left")
    stops = np.searchsorted(scale, centers + width, "right")
    fits = np.empty(len(places))
    for i, (first, stop) in enumerate(zip(firsts.tolist(), stops.tolist(), strict=True)):
        near = slice(first, stop)
        fits[i] = value_at(centers[i], scale[near], values[near], width)
    return fits


class Smoother:
    """`local_linear` for curves that grow: what the new points do not reach is not fitted again.

    A curve is known by its beginning. It may also be another one: then it is fitted whole.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[float, bytes], tuple[Vector, Vector, Vector, Vector]] = {}
        """Window and beginning -> steps, values, and the smoothed curve of both."""

    def __call__(self, steps: Vector, values: Vector, window: float) -> tuple[Vector, Vector]:
        """As `local_linear`, to the last digit."""
        kept = self.kept(steps, values, window)
        places = spaced(steps, window / 4)
        fits = np.concatenate([kept, fits_at(places[len(kept) :], steps, values, window)])
        self.known[beginning(steps, values, window)] = (steps, values, steps[places], fits)
        return steps[places], fits

    def kept(self, steps: Vector, values: Vector, window: float) -> Vector:
        """The fits from the beginning on that still hold."""
        key = beginning(steps, values, window)
        if key not in self.known:
            return np.empty(0)
        old_steps, old_values, at, fits = self.known[key]
        count = len(old_steps)
        same = np.array_equal(steps[:count], old_steps)
        if not same or not np.array_equal(values[:count], old_values):
            return np.empty(0)
        # With some room for rounding. The last place was there as the end alone, and is left out.
        reach = np.maximum(at[:-1], 1.0) * (1 + window) * (1 + 1e-9)
        return fits[: int(np.count_nonzero(reach < old_steps[-1]))]


def beginning(steps: Vector, values: Vector, window: float) -> tuple[float, bytes]:
    """What a curve and a window are known by."""
    return window, steps[:4].tobytes() + values[:4].tobytes()


def value_at(center: float, scale: Vector, values: Vector, width: float) -> float:
    """The value at `center` of the line that fits the points within `width` of it."""
    offsets = scale - center
    weights = (1 - np.minimum(np.abs(offsets) / width, 1) ** 3) ** 3
    total = weights.sum()
    # Around the weighted mean of the offsets, where the sums do not cancel each other.
    mean_offset = (weights @ offsets) / total
    mean = (weights @ values) / total
    spread = weights @ (offsets - mean_offset) ** 2
    # A single point has no slope: its value is the fit.
    if spread <= 1e-12 * total * width**2:
        return float(mean)
    slope = (weights @ ((offsets - mean_offset) * values)) / spread
    return float(mean - slope * mean_offset)


def ending(steps: Vector, values: Vector) -> tuple[float, int]:
    """The curve's value at its last step, and the number of steps in the fit.

    It is the fit of `local_linear` over the last 5% of the steps, or over the last 10 points of a
    short run. No constant lag is in it, unlike in a mean of the last steps.
    """
    scale = log_steps(steps)
    width = math.log1p(ENDING)
    if len(steps) > LEAST:
        # Beyond the tenth point from the end, whose weight would be 0 at the very border.
        width = max(width, float(scale[-1] - scale[-LEAST - 1]))
    elif len(steps) > 1:
        width = max(width, 1.1 * float(scale[-1] - scale[0]))
    near = scale > scale[-1] - width
    return value_at(float(scale[-1]), scale[near], values[near], width), int(near.sum())


def log_steps(steps: Vector) -> Vector:
    """The logarithm of the steps; step 0 counts as step 1."""
    return np.log(np.maximum(steps, 1.0))


def spaced(steps: Vector, gap: float) -> NDArray[np.int64]:
    """Indices of steps, each at least `gap` times the step before it further; both ends are in."""
    chosen = [0]
    while chosen[-1] < len(steps) - 1:
        here = float(steps[chosen[-1]])
        there = int(np.searchsorted(steps, here * (1 + gap), "left"))
        chosen.append(min(max(there, chosen[-1] + 1), len(steps) - 1))
    return np.array(chosen, np.int64)
