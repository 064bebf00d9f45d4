"""Scores of two models, or of two checkpoints, for the same rows: all from one table of counts.

A score is one of few values, so that a table of (value of the one, value of the other) -> rows says
as much as the rows: confusions, correlations and ranks are computed from it exactly.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.memorization.analyses.intervals import Interval, binomial_interval

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]
TOP = {"top 10%": 0.1, "top 1%": 0.01}
"""Selections of the rows with the highest sum of both scores."""


class Confusion(NamedTuple):
    """Rows by what the predictor says (memorized by it or not) and what is true of the target."""

    hits: int
    """True positives: memorized by both."""
    false_alarms: int
    """False positives: memorized by the predictor alone."""
    misses: int
    """False negatives: memorized by the target alone."""
    rejections: int
    """True negatives: memorized by neither."""

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def recall(self) -> float | None:
        """Share of the target's memorized rows that the predictor has; None without any."""
        return ratio(self.hits, self.hits + self.misses)

    @property
    def precision(self) -> float | None:
        """Share of the predictor's memorized rows that the target has; None without any."""
        return ratio(self.hits, self.hits + self.false_alarms)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of both; None where neither memorized a row."""
        return ratio(2 * self.hits, 2 * self.hits + self.false_alarms + self.misses)

    @property
    def false_positive_rate(self) -> float | None:
        """Share of the rows not memorized by the target that the predictor has."""
        return ratio(self.false_alarms, self.false_alarms + self.rejections)

    def recall_interval(self) -> Interval | None:
        """95% interval of the recall."""
        return binomial_interval(self.hits, self.hits + self.misses)

    def precision_interval(self) -> Interval | None:
        """95% interval of the precision."""
        return binomial_interval(self.hits, self.hits + self.false_alarms)


def ratio(part: float, whole: float) -> float | None:
    """A share; None of nothing."""
    if whole:
        return part / whole
    return None


def confusion_of(counts: Counts) -> Confusion:
    """The confusion of a table of counts; memorized is the highest score.

    Shapes  counts (L, L): first the predictor's score, then the target's.
    """
    hits = int(counts[-1, -1])
    predicted = int(counts[-1].sum())
    actual = int(counts[:, -1].sum())
    rows = int(counts.sum())
    return Confusion(hits, predicted - hits, actual - hits, rows - predicted - actual + hits)


def pearson(counts: Counts, first: Numbers, second: Numbers) -> float | None:
    """Correlation of two values over the rows of a table; None where one of them is constant.

    Shapes  counts (A, B), first (A,), second (B,) the values of its rows and columns.
    """
    total = counts.sum()
    if total < 2:
        return None
    # Centred before the sums: they lose no digits, whatever the number of rows.
    left = first - float(counts.sum(axis=1) @ first) / total
    right = second - float(counts.sum(axis=0) @ second) / total
    both = float(left @ counts @ right)
    spread = float(counts.sum(axis=1) @ left**2) * float(counts.sum(axis=0) @ right**2)
    # A constant value leaves rounding errors, no spread.
    if spread <= (1e-12 * float(total)) ** 2:
        return None
    return both / math.sqrt(spread)


def score_correlation(counts: Counts) -> float | None:
    """Pearson's correlation of the scores."""
    values = np.arange(len(counts), dtype=np.float64)
    return pearson(counts, values, values)


def rank_correlation(counts: Counts) -> float | None:
    """Spearman's correlation of the scores: Pearson's of their ranks, the mean one of ties."""
    return pearson(counts, midranks(counts.sum(axis=1)), midranks(counts.sum(axis=0)))


def midranks(counts: Counts) -> Numbers:
    """The mean rank of the rows of each value, from the least value on."""
    return np.cumsum(counts) - (counts - 1) / 2


def memorized_correlation(counts: Counts) -> float | None:
    """Pearson's correlation of "memorized" as 0 or 1, also called phi."""
    memorized = np.zeros(len(counts))
    memorized[-1] = 1
    return pearson(counts, memorized, memorized)


def top_of(counts: Counts, share: float) -> Counts:
    """The rows with the highest sum of both scores: at least `share` of them, ties included."""
    values = np.arange(len(counts))
    sums = values[:, None] + values[None, :]
    by_sum = np.bincount(sums.ravel(), counts.ravel())
    # Rows with at least each sum; the last sum that has enough of them.
    above = np.cumsum(by_sum[::-1])[::-1]
    enough = np.flatnonzero(above >= share * counts.sum())
    least = 0
    if len(enough):
        least = int(enough[-1])
    return np.where(sums >= least, counts, 0)
