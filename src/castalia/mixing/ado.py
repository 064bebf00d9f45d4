"""Adaptive Data Optimization: favours sources whose loss still falls, by fitted scaling laws.

Source  Jiang et al. 2025, arXiv:2410.11820, and src/data_selectors/ado.py of its code.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, normalise
from castalia.mixing.stats import Stats

FIRST_WIDTH = 10
"""Initial width of a bin of the loss history, in steps."""
MOST_BINS = 128
"""Number of bins at which neighbours are merged; bounds the size of the state."""
FLOORS = np.linspace(0.0, 0.98, 50)
"""Irreducible losses that a fit tries, as fractions of the lowest loss observed."""
LEAST_ALPHA = 0.05
"""Lower bound of a fitted exponent, from the authors' code."""
MOST_ALPHA = 1.0
"""Upper bound of a fitted exponent."""


@MIXERS.register("ado")
class Ado(Mixer):
    """Shares proportional to the prior times the speed at which each source's loss falls.

    L_i(n) = e_i + b_i n ** -a_i after n tokens of all sources; speed_i = a_i (L_i - e_i) / n;
    h_i a running mean of source i's share of the tokens read;
    rho_i proportional to prior_i sqrt(h_i (1 - h_i)) speed_i;
    p = past (mean of all p so far) + (1 - past) rho, floored at min(0.01, 1 / (2 K)).
    The prior holds until the first fit. Losses are stored in at most 128 bins.

    refit_every  steps between fits, and before the first.
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
            raise ConfigError(
                "ado: expected smoothing and past in [0, 1) and refit_every > 0,"
                f" got {smoothing}, {past} and {refit_every}"
            )
        self.smoothing = smoothing
        self.past = past
        self.refit_every = refit_every
        count = len(self.sources)
        # The code's floor of 0.01 per source cannot hold for K > 100; half of uniform always can.
        self.least = min(0.01, 0.5 / count)
        self.drawn_share = self.prior.copy()
        self.mean_share = self.prior.copy()
        # The fitted law L = floor + beta n ** -alpha; unused until `fitted`.
        self.floor = np.zeros(count)
        self.beta = np.ones(count)
        self.alpha = np.full(count, LEAST_ALPHA)
        # Closed bins (K, bins) and the open one (K,): summed nats and tokens.
        self.bin_loss = np.zeros((count, 0))
        self.bin_tokens = np.zeros((count, 0))
        self.open_loss = np.zeros(count)
        self.open_tokens = np.zeros(count)
        self.width = FIRST_WIDTH
        self.open_steps = 0
        self.tokens = 0.0
        self.averaged = 0
        self.last_fit = 0
        self.fitted = False

    def update(self, stats: Stats) -> None:
        """Store the losses, refit when due, then update the shares."""
        means, usable = self.losses(stats)
        tokens = np.where(usable, np.asarray(stats.tokens, np.float64), 0.0)
        total = float(tokens.sum())
        if total <= 0:
            return
        self.tokens += total
        self.drawn_share = self.smoothing * self.drawn_share + (1 - self.smoothing) * tokens / total
        self.store(means * tokens, tokens)

        # A law has three parameters, so a fit needs at least three bins.
        if stats.step - self.last_fit >= self.refit_every and self.bin_loss.shape[1] >= 3:
            self.floor, self.beta, self.alpha = fit(self.bin_loss, self.bin_tokens)
            self.last_fit = stats.step
            self.fitted = True
        if self.fitted:
            self.follow()

    def estimates(self) -> Vector | None:
        """Loss that each source's fitted law predicts now, in nats; None before the first fit."""
        if not self.fitted:
            return None
        return self.floor + self.beta * max(self.tokens, 1.0) ** -self.alpha

    def store(self, loss_sum: Vector, tokens: Vector) -> None:
        """Add a step to the open bin, close the bin when full, and merge pairs at 128 bins."""
        self.open_loss = self.open_loss + loss_sum
        self.open_tokens = self.open_tokens + tokens
        self.open_steps += 1
        if self.open_steps < self.width:
            return
        self.bin_loss = np.column_stack([self.bin_loss, self.open_loss])
        self.bin_tokens = np.column_stack([self.bin_tokens, self.open_tokens])
        self.open_loss = np.zeros_like(self.open_loss)
        self.open_tokens = np.zeros_like(self.open_tokens)
        self.open_steps = 0

        # Merging doubles the width, so 128 bins cover a run of any length.
        if self.bin_loss.shape[1] == MOST_BINS:
            self.bin_loss = self.bin_loss[:, ::2] + self.bin_loss[:, 1::2]
            self.bin_tokens = self.bin_tokens[:, ::2] + self.bin_tokens[:, 1::2]
            self.width *= 2

    def follow(self) -> None:
        """Set the shares for the current number of tokens."""
        # -dL/dn = a b n ** (-a - 1)
        speed = self.alpha * self.beta * self.tokens ** (-self.alpha - 1)
        credit = np.sqrt(self.drawn_share * (1 - self.drawn_share).clip(0))
        rho = normalise(self.prior * credit * speed)
        mixed = self.past * self.mean_share + (1 - self.past) * rho
        self.shares = normalise(np.maximum(mixed, self.least))
        self.averaged += 1
        # `averaged + 1`: the mean starts as the prior, which counts as one observation.
        self.mean_share = self.mean_share + (self.shares - self.mean_share) / (self.averaged + 1)


def fit(
    bin_loss: NDArray[np.float64], bin_tokens: NDArray[np.float64]
) -> tuple[Vector, Vector, Vector]:
    """Fit L(n) = e + b n ** -a to every source.

    For each e of a grid, log(L - e) is fitted to log n by least squares; the e whose curve is
    nearest in nats wins. A source with fewer than three bins gets a flat curve.

    Shapes  sums (K, n) by bin -> e, b, a, each (K,).
    """
    filled = bin_tokens > 0
    means = np.divide(bin_loss, bin_tokens, out=np.zeros_like(bin_loss), where=filled)
    steps = bin_tokens.sum(axis=0)
    # A bin stands at the middle of its tokens; 1 keeps the logarithm finite.
    log_n = np.log(np.maximum(np.cumsum(steps) - steps / 2, 1.0))
    least = np.where(filled, means, np.inf).min(axis=1)
    least[~np.isfinite(least)] = 0.0

    count = len(means)
    best: tuple[Vector, ...] = (
        np.full(count, np.inf),
        np.zeros(count),
        np.ones(count),
        np.full(count, LEAST_ALPHA),
    )
    for fraction in FLOORS:
        candidate = fit_above(fraction * least, means, filled, log_n)
        better = candidate[0] < best[0]
        best = tuple(np.where(better, new, old) for new, old in zip(candidate, best, strict=True))
    enough = filled.sum(axis=1) >= 3
    return best[1], np.where(enough, best[2], 0.0), best[3]


def fit_above(
    floor: Vector, means: NDArray[np.float64], filled: NDArray[np.bool_], log_n: Vector
) -> tuple[Vector, Vector, Vector, Vector]:
    """Fit b and a of every source above the irreducible loss `floor`.

    Shapes  floor (K,), means and filled (K, n), log_n (n,)
            -> squared error in nats, e, b, a, each (K,).
    """
    weight = filled / np.maximum(filled.sum(axis=1, keepdims=True), 1)
    y = np.log(np.maximum(means - floor[:, None], 1e-9))
    x_mean = weight @ log_n
    y_mean = (weight * y).sum(axis=1)
    dx = log_n[None, :] - x_mean[:, None]
    spread = (weight * dx * dx).sum(axis=1)
    slope = (weight * dx * (y - y_mean[:, None])).sum(axis=1) / np.maximum(spread, 1e-12)
    alpha = np.clip(-slope, LEAST_ALPHA, MOST_ALPHA)
    log_beta = y_mean + alpha * x_mean
    # Errors are compared in nats, not in logarithms, or the tail would decide the fit.
    curve = floor[:, None] + np.exp(log_beta[:, None] - alpha[:, None] * log_n[None, :])
    return (weight * (curve - means) ** 2).sum(axis=1), floor, np.exp(log_beta), alpha
