"""`Watch`: warns about a mixture that may follow noise or neglect most sources."""

import numpy as np
from numpy.typing import NDArray

from castalia.mixing.simplex import Vector
from castalia.mixing.stats import Stats, vector

PAST = 0.95
"""Weight of the past in the running mean of a loss."""
FALL = 0.01
"""Relative decrease that counts as a fall of the loss."""
RISE = 1.25
"""Relative growth of a share that counts as a rise, ..."""
LEAST_RISE = 0.02
"""... if it is two percentage points or more."""
FEW = 0.25
"""Fraction of the prior's effective sources, exp(entropy), below which a mixture is reported."""


class Watch:
    """Checks the weights and losses of every step, and gives each warning once.

    window  steps without a fall of the loss after which a rising share is reported.
    """

    def __init__(self, sources: tuple[str, ...], prior: Vector, *, window: int = 100) -> None:
        count = len(sources)
        self.sources = sources
        self.window = window
        self.few = FEW * effective(prior)
        self.loss = np.full(count, np.nan)
        """(K,) running means of the losses, NaN before the first."""
        self.low = np.full(count, np.inf)
        """(K,) the loss at its last fall."""
        self.share = prior
        """(K,) the share at the loss's last fall."""
        self.since = np.zeros(count, np.int64)
        """(K,) the step of the loss's last fall."""
        self.reported = np.zeros(count, bool)
        self.reported_few = False

    def observe(self, weights: Vector, stats: Stats) -> tuple[str, ...]:
        """Warnings after a step that followed `weights` (K,)."""
        self.take_in(weights, stats)
        warnings: list[str] = []
        for place in np.flatnonzero(self.suspects(weights, stats.step)):
            warnings.append(self.rising(int(place), weights[place], stats.step))
        if not self.reported_few and effective(weights) < max(self.few, 1.0):
            self.reported_few = True
            warnings.append(
                f"the mixture is down to {effective(weights):.1f} effective sources of"
                f" {len(weights)}, led by {self.sources[int(np.argmax(weights))]!r}"
                f" ({weights.max():.0%}); max_share limits a source"
            )
        return tuple(warnings)

    def take_in(self, weights: Vector, stats: Stats) -> None:
        """Update the running means; at a fall, note the share from which a rise is measured."""
        count = len(weights)
        tokens = vector(stats.tokens, count, "tokens", stats.step)
        with np.errstate(all="ignore"):
            means = vector(stats.loss_sum, count, "loss_sum", stats.step) / tokens
        # A source without tokens has 0 / 0 = NaN and keeps its running mean.
        drawn = np.isfinite(means)
        first = drawn & np.isnan(self.loss)
        running = np.where(drawn, PAST * self.loss + (1 - PAST) * means, self.loss)
        self.loss = np.where(first, means, running)
        fell = self.loss < (1 - FALL) * self.low
        self.low = np.where(fell, self.loss, self.low)
        self.share = np.where(fell, weights, self.share)
        self.since[fell] = stats.step

    def suspects(self, weights: Vector, step: int) -> NDArray[np.bool_]:
        """(K,) sources to report: their share rose, but their loss did not fall for a window."""
        rose = (weights > RISE * self.share) & (weights > self.share + LEAST_RISE)
        return rose & (step - self.since >= self.window) & np.isfinite(self.low) & ~self.reported

    def rising(self, place: int, weight: float, step: int) -> str:
        """The warning about a source that may be noise."""
        self.reported[place] = True
        return (
            f"the share of source {self.sources[place]!r} rose from {self.share[place]:.1%} to"
            f" {weight:.1%}, but its loss ({self.loss[place]:.2f} nats) has not fallen by"
            f" {FALL:.0%} for {step - self.since[place]} steps; if it is noise, limit it by"
            " max_share or use the mixer 'progress'"
        )


def effective(weights: Vector) -> float:
    """exp(entropy): the number of equal shares with the same entropy."""
    positive = weights[weights > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))
