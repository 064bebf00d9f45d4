"""Whether memorized rows come at random: their number in windows of the order against Poisson."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.memorization.analyses.intervals import chi_square_shares, poisson_shares

WINDOW = 512
"""Consecutive rows, as in Pythia's study."""
LEAST_WINDOW = 8
LEAST_WINDOWS = 32
"""Windows of a scan from which they have 512 rows; a shorter one has smaller windows."""

Counts = NDArray[np.int64]


class Density(NamedTuple):
    """The number of memorized rows in a window, over all windows of one scan."""

    window: int
    """Rows of a window."""
    counts: Counts
    """(K+1,) windows with 0 … K memorized rows."""

    @property
    def windows(self) -> int:
        """Complete windows."""
        return int(self.counts.sum())

    @property
    def rate(self) -> float:
        """Mean number of memorized rows in a window."""
        return float(self.counts @ np.arange(len(self.counts))) / self.windows

    @property
    def dispersion(self) -> float | None:
        """Index of dispersion, variance over mean: 1 under Poisson, more where they cluster."""
        if self.windows < 2 or self.rate == 0:
            return None
        spread = float(self.counts @ (np.arange(len(self.counts)) - self.rate) ** 2)
        return spread / (self.windows - 1) / self.rate

    @property
    def p_value(self) -> float | None:
        """Two-sided p of the dispersion test: chi-square of windows - 1 degrees of freedom.

        Source  Cochran 1954, Biometrics 10, 417-451.
        """
        if self.dispersion is None:
            return None
        shares = chi_square_shares(self.dispersion * (self.windows - 1), self.windows - 1)
        return min(1.0, 2 * min(shares))

    def expected(self) -> list[float]:
        """Windows with 0 … K memorized rows under Poisson with the same rate."""
        if self.rate == 0:
            return [float(self.windows)]
        largest = max(len(self.counts) - 1, far_count(self.rate, self.windows))
        return [self.windows * share for share in poisson_shares(self.rate, largest)]

    def quantiles(self) -> list[tuple[int, int, int]]:
        """Points of the Q-Q plot: Poisson's count, the count found, the windows at that point.

        The i-th smallest of n counts stands beside Poisson's quantile of (i - 1/2) / n.
        """
        below = np.cumsum(self.expected())
        # How many of the n plotting positions each of Poisson's counts reaches.
        reached = np.floor(below + 0.5).astype(np.int64)
        reached[-1] = self.windows
        found = np.cumsum(self.counts)
        cuts = np.unique(np.concatenate([reached, found]))
        cuts = cuts[(cuts > 0) & (cuts <= self.windows)]
        points = []
        for begin, end in zip([0, *cuts.tolist()], cuts.tolist(), strict=False):
            theory = int(np.searchsorted(reached, begin, side="right"))
            sample = int(np.searchsorted(found, begin, side="right"))
            points.append((theory, sample, end - begin))
        return points

    def data(self) -> dict[str, Any]:
        """The numbers of the test."""
        return {
            "window": self.window,
            "windows": self.windows,
            "rate": self.rate,
            "dispersion": self.dispersion,
            "p_value": self.p_value,
        }


def far_count(rate: float, windows: int) -> int:
    """A count that so many windows hardly reach under Poisson."""
    return math.ceil(rate + math.sqrt(2 * rate * math.log(windows + 1)) + math.log(windows + 1) + 1)


def window_of(rows: int, longest: int = WINDOW) -> int:
    """Rows of a window for a scan of so many rows: a power of two, at most `longest`."""
    window = LEAST_WINDOW
    while window * 2 <= longest and rows // (window * 2) >= LEAST_WINDOWS:
        window *= 2
    return window


def counts_in_windows(codes: NDArray[Any], memorized: int, window: int) -> Counts:
    """How many windows have 0 … `window` memorized rows; windows with a row missing are left out.

    codes      (R,) 0 for a missing row; `memorized` for a memorized one.
    Shapes     -> (window + 1,) int64
    """
    whole = len(codes) // window * window
    boxes = codes[:whole].reshape(-1, window)
    complete = boxes.all(axis=1)
    hits = (boxes == memorized).sum(axis=1)[complete]
    return np.bincount(hits, minlength=window + 1).astype(np.int64)
