"""Adaptive Data Optimization: more of the sources whose loss is still falling, by a scaling law fitted on the way.

Source  Jiang et al. 2025, arXiv:2410.11820, and src/data_selectors/ado.py of its code.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, normalise
from castalia.mixing.stats import Stats

FIRST_WIDTH, MOST_BINS = 10, 128
"""Steps in a bin of the loss history at first; the number of bins at which neighbours are merged."""
FLOORS = np.linspace(0.0, 0.98, 50)
"""Irreducible losses that a fit tries, as shares of the least loss seen."""
LEAST_ALPHA, MOST_ALPHA = 0.05, 1.0
"""Bounds of a fitted exponent; the lower is the code's."""


@MIXERS.register("ado")
class Ado(Mixer):
    """Shares that follow the prior times the speed at which each source's loss falls.

    L_i(n) = e_i + b_i n ** -a_i, n all tokens so far; speed_i = a_i (L_i - e_i) / n; h_i a running mean of the share
    of tokens drawn; rho proportional to prior_i sqrt(h_i (1 - h_i)) speed_i;
    p = past (mean of p so far) + (1 - past) rho, floored at min(0.01, 1 / (2 K)). The code's 0.01 is too much for
    K > 100. Up to the first fit it holds the prior. The losses are kept in at most 128 bins.

    refit_every  steps between fits, also before the first.
    """

    kind = "ado"
    per_source = (
        "shares", "rejected", "drawn_share", "mean_share", "floor", "beta", "alpha",
        "bin_loss", "bin_tokens", "open_loss", "open_tokens",
    )  # fmt: skip
    scalars = ("width", "open_steps", "tokens", "averaged", "last_fit", "fitted")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        smoothing: float = 0.9,
        past: float = 0.9,
        refit_every: int = 1000,
    ) -> None:
        super().__init__(sources, prior=prior)
        if not (0 <= smoothing < 1 and 0 <= past < 1 and refit_every > 0):
            raise ConfigError("ado: expected smoothing and past in [0, 1) and refit_every > 0")
        self.smoothing, self.past, self.refit_every = smoothing, past, refit_every
        count = len(self.sources)
        self.least = min(0.01, 0.5 / count)
        self.drawn_share, self.mean_share = self.prior.copy(), self.prior.copy()
        self.floor, self.beta, self.alpha = (
            np.zeros(count),
            np.ones(count),
            np.full(count, LEAST_ALPHA),
        )
        self.bin_loss, self.bin_tokens = np.zeros((count, 0)), np.zeros((count, 0))
        self.open_loss, self.open_tokens = np.zeros(count), np.zeros(count)
        self.width, self.open_steps, self.tokens = FIRST_WIDTH, 0, 0.0
        self.averaged, self.last_fit, self.fitted = 0, 0, False

    def update(self, stats: Stats) -> None:
        """File the losses; fit when it is time; then the shares."""
        means, seen = self.losses(stats)
        tokens = np.where(seen, np.asarray(stats.tokens, np.float64), 0.0)
        total = float(tokens.sum())
        if total <= 0:
            return
        self.tokens += total
        self.drawn_share = self.smoothing * self.drawn_share + (1 - self.smoothing) * tokens / total
        self.file(means * tokens, tokens)
        if stats.step - self.last_fit >= self.refit_every and self.bin_loss.shape[1] >= 3:
            self.floor, self.beta, self.alpha = fit(self.bin_loss, self.bin_tokens)
            self.last_fit, self.fitted = stats.step, True
        if self.fitted:
            self.follow()

    def estimates(self) -> Vector | None:
        """Loss that the fitted law of each source says of the present number of tokens; None before the first fit."""
        if not self.fitted:
            return None
        return self.floor + self.beta * max(self.tokens, 1.0) ** -self.alpha

    def file(self, loss_sum: Vector, tokens: Vector) -> None:
        """Add a step to the open bin; close it when it is wide enough; merge pairs when there are too many."""
        self.open_loss, self.open_tokens = self.open_loss + loss_sum, self.open_tokens + tokens
        self.open_steps += 1
        if self.open_steps < self.width:
            return
        self.bin_loss = np.column_stack([self.bin_loss, self.open_loss])
        self.bin_tokens = np.column_stack([self.bin_tokens, self.open_tokens])
        self.open_loss, self.open_tokens = (
            np.zeros_like(self.open_loss),
            np.zeros_like(self.open_tokens),
        )
        self.open_steps = 0
        if self.bin_loss.shape[1] == MOST_BINS:
            self.bin_loss = self.bin_loss[:, ::2] + self.bin_loss[:, 1::2]
            self.bin_tokens = self.bin_tokens[:, ::2] + self.bin_tokens[:, 1::2]
            self.width *= 2

    def follow(self) -> None:
        """The shares at the present number of tokens."""
        speed = self.alpha * self.beta * self.tokens ** (-self.alpha - 1)
        credit = np.sqrt(self.drawn_share * (1 - self.drawn_share).clip(0))
        rho = normalise(self.prior * credit * speed)
        mixed = self.past * self.mean_share + (1 - self.past) * rho
        self.shares = normalise(np.maximum(mixed, self.least))
        self.averaged += 1
        self.mean_share = self.mean_share + (self.shares - self.mean_share) / (self.averaged + 1)


def fit(
    bin_loss: NDArray[np.float64], bin_tokens: NDArray[np.float64]
) -> tuple[Vector, Vector, Vector]:
    """Fit L(n) = e + b n ** -a to every source: least squares of log(L - e) on log n for each e of a grid.

    Shapes  sums (K, n) by bin -> e, b, a, each (K,). The e whose curve is nearest in nats wins; a source with fewer
            than three bins gets a flat curve.
    """
    seen = bin_tokens > 0
    means = np.divide(bin_loss, bin_tokens, out=np.zeros_like(bin_loss), where=seen)
    steps = bin_tokens.sum(axis=0)
    log_n = np.log(np.maximum(np.cumsum(steps) - steps / 2, 1.0))
    least = np.where(seen, means, np.inf).min(axis=1)
    least[~np.isfinite(least)] = 0.0
    count = len(means)
    best: tuple[Vector, ...] = (
        np.full(count, np.inf),
        np.zeros(count),
        np.ones(count),
        np.full(count, LEAST_ALPHA),
    )
    for share in FLOORS:
        found = fit_above(share * least, means, seen, log_n)
        best = tuple(
            np.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True)
        )
    enough = seen.sum(axis=1) >= 3
    return best[1], np.where(enough, best[2], 0.0), best[3]


def fit_above(
    floor: Vector, means: NDArray[np.float64], seen: NDArray[np.bool_], log_n: Vector
) -> tuple[Vector, Vector, Vector, Vector]:
    """Squared error in nats, e, b and a of the best curve above the irreducible loss `floor`, for every source."""
    weight = seen / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    y = np.log(np.maximum(means - floor[:, None], 1e-9))
    x_mean, y_mean = weight @ log_n, (weight * y).sum(axis=1)
    dx = log_n[None, :] - x_mean[:, None]
    spread = (weight * dx * dx).sum(axis=1)
    slope = (weight * dx * (y - y_mean[:, None])).sum(axis=1) / np.maximum(spread, 1e-12)
    alpha = np.clip(-slope, LEAST_ALPHA, MOST_ALPHA)
    log_beta = y_mean + alpha * x_mean
    curve = floor[:, None] + np.exp(log_beta[:, None] - alpha[:, None] * log_n[None, :])
    return (weight * (curve - means) ** 2).sum(axis=1), floor, np.exp(log_beta), alpha
