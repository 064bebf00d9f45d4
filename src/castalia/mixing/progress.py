"""Learning progress: more of the sources whose loss still falls, however high or low it stands."""

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
    """Shares in proportion to the prior times the speed of learning, in nats for each e-fold of the steps.

    s_i = -d loss_i / d ln t, by least squares over the training losses so far. The loss of step u counts at step t in
    proportion to the tokens drawn and to (u / t) ** memory: with memory 2 the last half of the steps has 7/8 of the
    weight. Each slope is drawn towards that of all sources together, as `caution` steps at an even share would.
    p = (1 - least) q + least prior, q_i proportional to prior_i max(s_i, 0) ** power.

    Why: when the loss of a source follows what was read of it alone, L_i(n_i), the sum of prior_i L_i is least for a
    given number of tokens where prior_i dL_i/dn_i is the same everywhere, that is where n_i is in proportion to
    prior_i (-dL_i/d ln n_i); and at steady shares ln n_i moves as ln t does. Noise has a high loss and no slope, what
    is known has a low loss and no slope: both fall to `least`. The prior says what is wanted: uniform for the mean over
    sources, natural for the mean over tokens, the temperature mixture for a bit of both.
    """

    kind = "progress"
    per_source = ("shares", "rejected", "lately", "weight", "x", "y", "xx", "xy")
    scalars = ("last",)

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        memory: float = 3.0,
        caution: float = 10.0,
        enough: float = 0.5,
        least: float = 0.1,
        recent: float = 10.0,
    ) -> None:
        super().__init__(sources, prior=prior)
        if not (memory >= 0 and recent >= 0 and caution > 0 and enough > 0 and 0 <= least <= 1):
            raise ConfigError(
                "progress: expected memory >= 0, recent >= 0, caution > 0, enough > 0 and 0 <= least <= 1,"
                f" got {memory}, {recent}, {caution}, {enough} and {least}"
            )
        self.memory, self.recent, self.caution, self.enough, self.least = memory, recent, caution, enough, least
        self.weight, self.x, self.y, self.xx, self.xy = np.zeros((5, len(self.sources)))
        self.lately = self.prior.copy()
        self.last = 0

    def update(self, stats: Stats) -> None:
        """Let the past fade, take in the step, and follow the slopes."""
        means, seen = self.losses(stats)
        tokens = np.where(seen, np.asarray(stats.tokens, np.float64), 0.0)
        if tokens.sum() <= 0:
            return
        drawn, fading = tokens / tokens.sum(), (self.last / stats.step) ** self.recent
        self.lately = fading * self.lately + (1 - fading) * (0.999 * drawn + 0.001 * self.prior)
        new, x = len(tokens) * drawn, np.log(np.maximum(stats.step * self.lately, 1e-300))
        kept = (self.last / stats.step) ** self.memory
        self.last = stats.step
        self.weight, self.x, self.y = kept * self.weight + new, kept * self.x + new * x, kept * self.y + new * means
        self.xx, self.xy = kept * self.xx + new * x * x, kept * self.xy + new * (x * means)
        slopes, pooled = self.slopes()
        if pooled > FLAT:
            gate = np.clip(slopes / (self.enough * pooled), 0.0, 1.0)
            self.shares = (1 - self.least) * normalise(self.prior * gate) + self.least * self.prior

    def slopes(self) -> tuple[Vector, float]:
        """Nats that a loss falls while what is read of its source grows e-fold: (K,), and of all sources together."""
        weight = np.maximum(self.weight, 1e-300)
        spread = np.maximum(self.xx - self.x * self.x / weight, 0.0)
        fall = self.x * self.y / weight - self.xy
        pooled = float(fall.sum() / max(spread.sum(), 1e-300))
        trust = self.caution * spread.sum() / max(self.weight.sum(), 1e-300)
        return (fall + trust * pooled) / np.maximum(spread + trust, 1e-300), pooled
