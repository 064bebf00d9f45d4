"""Scores against the place of a row in the order of training."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.memorization.analyses.intervals import (
    Interval,
    binomial_interval,
    mean_interval,
    student_quantile,
)

BUCKETS = 60
"""Of the order; a bucket is a mark of the picture."""
MILLION = 1e6


class Slope(NamedTuple):
    """A straight line of the score against the place, by least squares."""

    rows: int
    per_million: float
    """Change of the score per million rows."""
    interval: Interval
    """95%, by Student's t with rows - 2 degrees of freedom."""
    change: float | None
    """Change from the first place to the last, as a share of the mean score; None at mean 0."""


class Positions:
    """Sums of the scores of one scan by bucket of places, and those of a regression."""

    def __init__(self, places: int, pieces: int, buckets: int = BUCKETS) -> None:
        self.size = max(1, math.ceil(places / buckets))
        self.middle = places / 2
        """Places are taken from here, so that the sums lose no digits."""
        self.pieces = pieces
        count = math.ceil(places / self.size)
        self.rows = np.zeros(count, np.int64)
        self.hits = np.zeros(count, np.int64)
        self.totals = np.zeros(count)
        self.squares = np.zeros(count)
        self.moments = np.zeros(4)
        """Sums of x, x^2, x y and y over rows, x in millions from the middle."""
        self.ends = (places, -1)
        """First and last place with a row."""

    def add(self, first: int, codes: NDArray[Any]) -> None:
        """Add scores of consecutive places.

        codes  (R,) 0 for a missing row, else matching pieces + 1.
        """
        inside = np.flatnonzero(codes)
        if not len(inside):
            return
        matches = codes[inside].astype(np.float64) - 1
        scores = matches / self.pieces
        places = inside + first
        buckets = places // self.size
        count = len(self.rows)
        self.rows += np.bincount(buckets, minlength=count)
        self.hits += np.bincount(buckets[matches == self.pieces], minlength=count)
        self.totals += np.bincount(buckets, scores, minlength=count)
        self.squares += np.bincount(buckets, scores * scores, minlength=count)
        x = (places - self.middle) / MILLION
        self.moments += (x.sum(), x @ x, x @ scores, scores.sum())
        self.ends = (min(self.ends[0], int(places[0])), max(self.ends[1], int(places[-1])))

    def slope(self) -> Slope | None:
        """The regression; None for fewer than three rows."""
        rows = int(self.rows.sum())
        if rows < 3:
            return None
        x, xx, xy, y = (float(value) for value in self.moments)
        spread = xx - x * x / rows
        both = xy - x * y / rows
        scores = float(self.squares.sum()) - y * y / rows
        slope = both / spread
        rest = max(0.0, scores - slope * both)
        half = student_quantile(rows - 2) * math.sqrt(rest / (rows - 2) / spread)
        length = (self.ends[1] - self.ends[0]) / MILLION
        change = None
        if y:
            change = slope * length / (y / rows)
        return Slope(rows, slope, (slope - half, slope + half), change)

    def data(self) -> list[dict[str, Any]]:
        """Buckets with rows: mean score and share memorized, with intervals."""
        lines = []
        for place in np.flatnonzero(self.rows).tolist():
            rows = int(self.rows[place])
            hits = int(self.hits[place])
            total = float(self.totals[place])
            mean = mean_interval(rows, total, float(self.squares[place])) or (None, None)
            share = binomial_interval(hits, rows) or (None, None)
            lines.append(
                {
                    "first": place * self.size,
                    "middle": (place + 0.5) * self.size,
                    "rows": rows,
                    "mean_score": total / rows,
                    "mean_low": mean[0],
                    "mean_high": mean[1],
                    "share": hits / rows,
                    "share_low": share[0],
                    "share_high": share[1],
                }
            )
        return lines
