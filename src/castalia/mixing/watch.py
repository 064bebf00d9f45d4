"""`Watch`: warns where a mixture does what it should not: it follows what may be noise, or leaves a source alone."""

import numpy as np
from numpy.typing import NDArray

from castalia.mixing.simplex import Vector
from castalia.mixing.stats import Stats, vector

PAST = 0.95
"""The past's part in the running mean of a loss."""
FALL, RISE, LEAST_RISE = 0.01, 1.25, 0.02
"""A loss has fallen by 1%; a share has risen by a quarter, and by two percentage points."""
FEW = 0.25
"""Part of the prior's effective sources, exp(entropy), below which a mixture is told."""


class Watch:
    """Looks at the weights and losses of every step, and says each thing once.

    window  steps without a falling loss from which on a rising share is told.
    """

    def __init__(self, sources: tuple[str, ...], prior: Vector, *, window: int = 100) -> None:
        count = len(sources)
        self.sources, self.window = sources, window
        self.few = FEW * effective(prior)
        self.loss, self.low, self.share = np.full(count, np.nan), np.full(count, np.inf), prior
        self.since = np.zeros(count, np.int64)
        self.told, self.told_few = np.zeros(count, bool), False

    def observe(self, weights: Vector, stats: Stats) -> tuple[str, ...]:
        """What a person should hear after a step that followed `weights` (K,)."""
        self.take_in(weights, stats)
        said = [
            self.rising(int(i), weights[i], stats.step)
            for i in np.flatnonzero(self.suspects(weights, stats.step))
        ]
        if not self.told_few and effective(weights) < max(self.few, 1.0):
            self.told_few = True
            said.append(
                f"the mixture has come down to {effective(weights):.1f} effective sources of {len(weights)}, most of it"
                f" {self.sources[int(np.argmax(weights))]!r} ({weights.max():.0%}); max_share holds a source down"
            )
        return tuple(said)

    def take_in(self, weights: Vector, stats: Stats) -> None:
        """The running means of the losses; where one falls to a new low, its share now is what a rise starts from."""
        count = len(weights)
        tokens = vector(stats.tokens, count, "tokens", stats.step)
        with np.errstate(all="ignore"):
            means = vector(stats.loss_sum, count, "loss_sum", stats.step) / tokens
        seen = np.isfinite(means)
        first = seen & np.isnan(self.loss)
        self.loss = np.where(
            first, means, np.where(seen, PAST * self.loss + (1 - PAST) * means, self.loss)
        )
        fell = self.loss < (1 - FALL) * self.low
        self.low, self.share = (
            np.where(fell, self.loss, self.low),
            np.where(fell, weights, self.share),
        )
        self.since[fell] = stats.step

    def suspects(self, weights: Vector, step: int) -> NDArray[np.bool_]:
        """Sources, not told yet, whose share rose while their loss stood for a window."""
        rose = (weights > RISE * self.share) & (weights > self.share + LEAST_RISE)
        return rose & (step - self.since >= self.window) & np.isfinite(self.low) & ~self.told

    def rising(self, place: int, weight: float, step: int) -> str:
        """The sentence about a source that may be noise."""
        self.told[place] = True
        return (
            f"source {self.sources[place]!r} is read more, {weight:.1%} after {self.share[place]:.1%}, though its loss"
            f" ({self.loss[place]:.2f} nats) has not fallen by {FALL:.0%} for {step - self.since[place]} steps; if it"
            " is noise, max_share or the mixer 'progress' hold it down"
        )


def effective(weights: Vector) -> float:
    """exp(entropy): the number of sources, if all had the same share."""
    positive = weights[weights > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))
