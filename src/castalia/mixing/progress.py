"""Learning progress: less of the sources whose loss does not fall, however high or low it stands."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, normalise
from castalia.mixing.stats import Stats

FLAT = 1e-9
"""Nats for each e-fold of the steps below which nothing is learned anywhere."""


@MIXERS.register("progress")
class Progress(Mixer):
    """The prior, less of the sources that have stopped to learn or never began.

    s_i = -d loss_i / d ln(t r_i), by least squares over the training losses so far, r_i the share read lately: how much
    the loss falls while what is read of the source grows e-fold. At step t the loss of step u has the weight of its
    tokens times (u / t) ** memory, so with memory 3 the last half of the run counts 15/16; r_i fades alike with
    `recent`. Each s_i is drawn towards s, that of all sources together, the more the less sure it is: with weight
    (caution e_i)^2 against s^2, e_i its standard error.
    p = (1 - least) q + least prior, q_i proportional to prior_i min(max(s_i, 0) / (enough s), 1).

    Noise has a high loss and what is known a low one, and neither falls: both drop to `least` of their prior share, and
    come back when their loss moves again. A source that learns faster than others gets no more for it: its slope says
    what its rows do for itself, and not what they do for the others.
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
                "progress: expected memory, recent and caution >= 0, enough > 0 and 0 <= least <= 1,"
                f" got {memory}, {recent}, {caution}, {enough} and {least}"
            )
        self.memory, self.recent, self.caution, self.enough, self.least = memory, recent, caution, enough, least
        self.lately, self.last = self.prior.copy(), 0
        self.sums = np.zeros((7, len(self.sources))).T
        """Weights w, squares of w, and w times x, y, xx, xy, yy; x the logarithm of what is read, y the loss."""

    def update(self, stats: Stats) -> None:
        """Let the past fade, take in the step, and follow the slopes."""
        means, seen = self.losses(stats)
        tokens = np.where(seen, np.asarray(stats.tokens, np.float64), 0.0)
        if tokens.sum() <= 0:
            return
        drawn, past = tokens / tokens.sum(), self.last / stats.step
        kept, fading, self.last = past**self.memory, past**self.recent, stats.step
        self.lately = fading * self.lately + (1 - fading) * (0.999 * drawn + 0.001 * self.prior)
        w, x, y = drawn, np.log(np.maximum(stats.step * self.lately, 1e-300)), means
        wx, wy = w * x, w * y
        sums = np.ascontiguousarray(self.sums.T) * kept  # a vector of all sources for each of the seven sums
        sums[1] *= kept
        for old, new in zip(sums, (w, w * w, wx, wy, wx * x, wx * y, wy * y), strict=True):
            old += new
        self.sums = sums.T
        slopes, pooled = self.slopes()
        if pooled > FLAT:
            gate = np.minimum(np.maximum(slopes / (self.enough * pooled), 0.0), 1.0)
            self.shares = (1 - self.least) * normalise(self.prior * gate) + self.least * self.prior

    def slopes(self) -> tuple[Vector, float]:
        """Nats that a loss falls while what is read of its source grows e-fold: (K,), and of all sources together."""
        w = self.sums.T[0]
        ww, x, y, xx, xy, yy = self.sums.T[1:] / np.maximum(w, 1e-300)
        spread, fall = np.maximum(xx - x * x, 1e-12), x * y - xy
        pooled = float((w * fall).sum() / (w * spread).sum())
        # (sum w)^2 / sum w^2 is the number of losses that count; ww is sum w^2 / sum w.
        count = w / np.maximum(ww, 1e-300)
        left = np.maximum(yy - y * y - fall * fall / spread, 0.0)
        error = left / (spread * np.maximum(count - 2, 1e-3))
        sure = pooled * pooled / np.maximum(pooled * pooled + self.caution**2 * error, 1e-300)
        sure = np.where(count > 3, sure, 0.0)
        return sure * fall / spread + (1 - sure) * pooled, pooled
