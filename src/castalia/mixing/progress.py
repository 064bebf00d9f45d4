"""Learning progress: less of the sources whose loss does not fall, however high or low it stands."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector
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
        self.memory, self.recent, self.caution, self.enough, self.least = (
            memory,
            recent,
            caution,
            enough,
            least,
        )
        self.lately, self.last = self.prior.copy(), 0
        self.sums = np.zeros((7, len(self.sources))).T
        """Weights w, squares of w, and w times x, y, xx, xy, yy; x the logarithm of what is read, y the loss."""
        self.trickle, self.base = 0.001 * self.prior, self.least * self.prior
        # Memory that every step uses again, and constants as vectors: an operation on these costs half.
        self.wxy, self.new, self.work = (np.empty((rows, len(self.sources))) for rows in (3, 7, 6))
        self.zero, self.tiny, self.narrow, self.few = (
            np.full(len(self.sources), value) for value in (0.0, 1e-300, 1e-12, 1e-3)
        )
        self.loaded()

    def loaded(self) -> None:
        """A row of memory for each of the seven sums."""
        self.by_sum = np.ascontiguousarray(self.sums.T)
        self.sums = self.by_sum.T

    def update(self, stats: Stats) -> None:
        """Let the past fade, take in the step, and follow the slopes."""
        means, seen = self.losses(stats)
        tokens = np.where(seen, np.asarray(stats.tokens, np.float64), 0.0)
        total = tokens.sum()
        if total <= 0:
            return
        past, self.last = self.last / stats.step, stats.step
        tokens /= total
        self.take_in(tokens, means, past)
        slopes, pooled = self.slopes()
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
        """The share read lately and the seven sums: the past fades, the step comes in."""
        wxy, new, sums = self.wxy, self.new, self.by_sum
        x, fading, kept = wxy[1], past**self.recent, past**self.memory
        now = np.multiply(w, 0.999, out=x)
        now += self.trickle
        now *= 1 - fading
        self.lately *= fading
        self.lately += now
        np.maximum(np.multiply(self.lately, self.last, out=x), self.tiny, out=x)
        np.log(x, out=x)
        wxy[0], wxy[2], new[0] = w, y, w
        np.multiply(wxy, w, out=new[1:4])
        np.multiply(wxy[1:], new[2], out=new[4:6])
        np.multiply(new[3], y, out=new[6])
        sums *= kept
        sums[1] *= kept
        sums += new

    def slopes(self) -> tuple[Vector, float]:
        """Nats that a loss falls while what is read of its source grows e-fold: (K,), and of all sources together."""
        sums, work = self.by_sum, self.work
        w, central, free = sums[0], work[2:5], work[5]
        means = np.divide(sums[2:4], np.maximum(w, self.tiny, out=free), out=work[:2])
        np.multiply(means, sums[2], out=central[:2])
        np.multiply(means[1], sums[3], out=central[2])
        spread, rise, left = np.subtract(
            sums[4:], central, out=central
        )  # w times the variances of x, xy, y
        np.maximum(spread, self.narrow, out=spread)
        pooled = -float(rise.sum() / spread.sum())
        slopes = rise / spread
        rise *= slopes
        left -= rise
        np.maximum(left, self.zero, out=left)
        # (sum w)^2 / sum w^2 is the number of losses that count.
        count = np.multiply(w, w, out=free)
        count /= np.maximum(sums[1], self.tiny, out=rise)
        room = np.maximum(np.subtract(count, 2, out=rise), self.few, out=rise)
        room *= spread
        # left / room is the squared error e^2 of a slope, which is believed by p^2 / (p^2 + caution^2 e^2).
        left *= self.caution**2 / max(pooled * pooled, 1e-200)
        left += room
        sure = np.divide(room, left, out=left)
        if count.min() <= 3:
            sure[count <= 3] = 0.0
        slopes += pooled
        slopes *= sure
        return np.subtract(pooled, slopes, out=slopes), pooled
