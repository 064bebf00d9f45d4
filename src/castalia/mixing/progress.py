"""Learning progress: reads less of the sources whose loss does not fall, high or low."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector
from castalia.mixing.stats import Stats

FLAT = 1e-9
"""Slope in nats per e-fold of steps below which no source is learning."""


@MIXERS.register("progress")
class LearningProgress(Mixer):
    """The prior, with less of the sources that no longer learn or never did.

    s_i = -d loss_i / d ln(t r_i), fitted by least squares to the training losses so far, is how far
    the loss falls while the amount read of source i grows e-fold; r_i is its recent share.
    At step t the loss of step u has the weight of its tokens times (u / t) ** memory: with memory 3
    the last half of the run counts 15/16. r_i fades likewise with `recent`.
    Each s_i is shrunk towards s, the slope of all sources together, by its uncertainty: with weight
    (caution e_i)^2 against s^2, where e_i is its standard error.
    p = (1 - least) q + least prior,
    q_i proportional to prior_i min(max(s_i, 0) / (enough s), 1).

    The loss of noise is high, that of known text is low, and neither falls: both drop to `least` of
    their prior share, and recover when their loss moves again. A source that learns faster than
    the others gets no more than its prior share, because its slope measures what its rows do for
    itself, not what they do for the others.
    """

    kind = "progress"
    per_source = ("shares", "rejected", "lately", "sums")
    scalars = ("last",)

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        memory: float = 3.0,
        recent: float = 10.0,
        caution: float = 2.0,
        enough: float = 0.75,
        least: float = 0.1,
    ) -> None:
        super().__init__(sources, prior=prior)
        if not (memory >= 0 and recent >= 0 and caution >= 0 and enough > 0 and 0 <= least <= 1):
            raise ConfigError(
                "progress: expected memory, recent and caution >= 0, enough > 0 and"
                " 0 <= least <= 1,"
                f" got {memory}, {recent}, {caution}, {enough} and {least}"
            )
        self.memory = memory
        self.recent = recent
        self.caution = caution
        self.enough = enough
        self.least = least
        count = len(self.sources)
        self.lately = self.prior.copy()
        """r_i, the recent share of source i."""
        self.last = 0
        """The last step with a usable loss."""
        self.sums = np.zeros((7, count)).T
        """(K, 7) sums of w, w w, and w times x, y, xx, xy, yy: w the weight, x the logarithm of the
        amount read, y the loss."""
        # A source that is never drawn counts as read a little, so that its logarithm is finite.
        self.trickle = 0.001 * self.prior
        self.base = self.least * self.prior
        # Buffers reused by every step, and constants as vectors: numpy then takes half the time.
        self.wxy = np.empty((3, count))
        self.new = np.empty((7, count))
        self.work = np.empty((6, count))
        self.zero = np.full(count, 0.0)
        self.tiny = np.full(count, 1e-300)
        self.narrow = np.full(count, 1e-12)
        self.few = np.full(count, 1e-3)
        self.loaded()

    def loaded(self) -> None:
        """Lay the sums out with one contiguous row for each of the seven; `sums` is its view."""
        self.by_sum = np.ascontiguousarray(self.sums.T)
        self.sums = self.by_sum.T

    def update(self, stats: Stats) -> None:
        """Fade the past, add the step, then follow the slopes."""
        means, usable = self.losses(stats)
        tokens = np.where(usable, np.asarray(stats.tokens, np.float64), 0.0)
        total = tokens.sum()
        if total <= 0:
            return
        # Products of these ratios telescope: step u has the weight (u / t) ** memory at step t.
        past = self.last / stats.step
        self.last = stats.step
        tokens /= total
        self.take_in(tokens, means, past)
        slopes, pooled = self.slopes()
        # If nothing is learned anywhere, slopes cannot tell sources apart: keep the shares.
        if pooled > FLAT:
            slopes /= self.enough * pooled
            gate = np.minimum(np.maximum(slopes, self.zero, out=slopes), self.ones, out=slopes)
            gate *= self.prior
            passed = gate.sum()
            if passed > 0:
                gate *= (1 - self.least) / passed
                gate += self.base
                self.shares = gate

    def estimates(self) -> Vector:
        """The slopes."""
        return self.slopes()[0]

    def take_in(self, w: Vector, y: Vector, past: float) -> None:
        """Update the recent shares and the seven sums with a step.

        w     (K,) share of the step's tokens; y: (K,) loss in nats a token.
        past  last step over this step, whose powers fade the past.
        """
        wxy = self.wxy
        new = self.new
        sums = self.by_sum
        x = wxy[1]
        fading = past**self.recent
        kept = past**self.memory
        now = np.multiply(w, 0.999, out=x)
        now += self.trickle
        now *= 1 - fading
        self.lately *= fading
        self.lately += now
        np.maximum(np.multiply(self.lately, self.last, out=x), self.tiny, out=x)
        np.log(x, out=x)

        # new = w, w w, w x, w y, w x x, w x y, w y y
        wxy[0] = w
        wxy[2] = y
        new[0] = w
        np.multiply(wxy, w, out=new[1:4])
        np.multiply(wxy[1:], new[2], out=new[4:6])
        np.multiply(new[3], y, out=new[6])
        sums *= kept
        sums[1] *= kept  # the sum of w w fades with the square
        sums += new

    def slopes(self) -> tuple[Vector, float]:
        """Nats by which a loss falls while the amount read of its source grows e-fold.

        Returns  (K,) shrunk slopes, and the slope of all sources together.
        """
        sums = self.by_sum
        work = self.work
        w = sums[0]
        central = work[2:5]
        free = work[5]
        # Central second moments: sum w xx - (sum w x)^2 / sum w, and likewise for xy and yy.
        means = np.divide(sums[2:4], np.maximum(w, self.tiny, out=free), out=work[:2])
        np.multiply(means, sums[2], out=central[:2])
        np.multiply(means[1], sums[3], out=central[2])
        spread, rise, left = np.subtract(sums[4:], central, out=central)
        np.maximum(spread, self.narrow, out=spread)
        pooled = -float(rise.sum() / spread.sum())
        slopes = rise / spread
        # Residual sum of squares of the regression: yy - xy^2 / xx.
        rise *= slopes
        left -= rise
        np.maximum(left, self.zero, out=left)
        # Effective number of losses: (sum w)^2 / sum w^2 (Kish 1965).
        count = np.multiply(w, w, out=free)
        count /= np.maximum(sums[1], self.tiny, out=rise)
        room = np.maximum(np.subtract(count, 2, out=rise), self.few, out=rise)
        room *= spread
        # e^2 = left / room is the squared standard error of a slope, with count - 2 degrees of
        # freedom. The slope is trusted by p^2 / (p^2 + caution^2 e^2), p the pooled slope.
        left *= self.caution**2 / max(pooled * pooled, 1e-200)
        left += room
        sure = np.divide(room, left, out=left)
        # Up to three losses say nothing about their own error: use the pooled slope.
        if count.min() <= 3:
            sure[count <= 3] = 0.0
        slopes += pooled
        slopes *= sure
        return np.subtract(pooled, slopes, out=slopes), pooled
