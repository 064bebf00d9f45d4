"""Bandit mixers: a source is an arm, its loss the reward. Online Data Mixing and its variants.

Source  Albalak et al. 2023, arXiv:2312.02406 (ODM); paper and code differ, and both are here.
        Auer et al. 2002 (Exp3).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, by_source, gibbs
from castalia.mixing.stats import Stats, vector

ODM_GUARD = 2.0
"""Default limit of `odm` on the factor by which one step changes a share."""
SETTLED = 1e-17
"""Below half an ulp of 1 in float64: 1 - SETTLED == 1."""


def exploration(step: int, count: int) -> float:
    """eps_t = min(1/K, sqrt(ln K / (K t))): the guaranteed share of every source; 0 if K is 1.

    K eps_t of the data is mixed uniformly. With 1,000 sources that is all of it up to step 6,908.

    Source  arXiv:2312.02406, algorithm 1.
    """
    if count == 1:
        return 0.0
    if step <= 0:
        return 1 / count
    return min(1 / count, math.sqrt(math.log(count) / (count * step)))


class Bandit(Mixer):
    """Base: mixes an exploration share eps, which falls with the step, into what was learned."""

    scalars = ("eps",)

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__(sources, prior=prior)
        count = len(self.sources)
        if eps is not None and not 0 <= eps * count <= 1:
            raise ConfigError(
                f"eps: expected between 0 and 1/K = {1 / count:g} for {count} sources, got {eps}"
            )
        self.fixed_eps = eps
        self.eps = 1 / count

    def eps_at(self, step: int) -> float:
        """The exploration share of a step."""
        if self.fixed_eps is not None:
            return self.fixed_eps
        return exploration(step, len(self.sources))

    def explore(self, shares: Vector, step: int) -> None:
        """shares <- (1 - K eps_t) shares + eps_t."""
        self.eps = self.eps_at(step)
        self.shares = (1 - len(shares) * self.eps) * shares + self.eps

    def notes(self, steps: int) -> list[str]:
        """Warn if exploration still takes over half of the data after a fifth of the run."""
        count = len(self.sources)
        early = count * self.eps_at(max(steps // 5, 1))
        if early <= 0.5:
            return []
        return [
            f"mixer {self.kind!r}: with {count} sources, exploration mixes {early:.0%} of the data"
            f" uniformly at a fifth of the run and {count * self.eps_at(steps):.0%} at its end;"
            " set eps= lower"
        ]

    def report(self) -> dict[str, float]:
        """K eps, the part of the data mixed uniformly regardless of what was learned."""
        return {"uniform_share": round(len(self.sources) * self.eps, 6)}


class RunningMean(Bandit):
    """Base of the two published forms: a running mean per source that starts at 0.

    Like the authors' code, both learn nothing during warm-up.
    """

    collects = False
    per_source = ("shares", "rejected", "estimate")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        smoothing: float = 0.9,
        eps: float | None = None,
    ) -> None:
        super().__init__(sources, prior=prior, eps=eps)
        self.smoothing = check_smoothing(smoothing)
        self.estimate = np.zeros(len(self.sources))

    def estimates(self) -> Vector:
        """The running means."""
        return self.estimate

    def mean_with(self, rewards: Vector, usable: NDArray[np.bool_]) -> Vector:
        """The running means updated with the usable rewards."""
        moved = self.smoothing * self.estimate + (1 - self.smoothing) * rewards
        return np.where(usable, moved, self.estimate)


@MIXERS.register("odm-repo")
class OdmRepo(RunningMean):
    """ODM as the authors' code runs it: shares proportional to a running mean of perplexity.

    R_i <- a R_i + (1 - a) exp(loss_i) for the sources drawn, from R_i = 0;
    p = (1 - K eps_t) R / sum R + eps_t.
    Nothing is learned during warm-up, so most sources drop to eps_t right after it.

    Source  SmoothedMeanWeightUpdater.group_update, megatron/data/data_sampling_utils.py:501-528 of
            online-data-mixing.
    """

    kind = "odm-repo"

    def update(self, stats: Stats) -> None:
        """Update the running means, then the shares."""
        means, usable = self.losses(stats)
        self.estimate = self.mean_with(np.exp(means), usable)
        total = self.estimate.sum()
        if total > 0:
            self.explore(self.estimate / total, stats.step)


@MIXERS.register("odm-paper")
class OdmPaper(RunningMean):
    """ODM as published: a Gibbs distribution over an importance-weighted running mean of the loss.

    R_i <- a R_i + (1 - a) loss_i / p_i for the sources drawn;
    p = (1 - K eps_t) gibbs(eps_(t-1) R) + eps_t.
    The exponent vanishes with eps, so the mixture becomes nearly uniform. Kept for comparison.

    Source  algorithm 1 of arXiv:2312.02406.
    """

    kind = "odm-paper"

    def update(self, stats: Stats) -> None:
        """Update the running means, then the shares."""
        means, usable = self.losses(stats)
        weighted = np.divide(
            means, self.shares, out=np.zeros(len(means)), where=usable & (self.shares > 0)
        )
        self.estimate = self.mean_with(weighted, usable)
        self.explore(gibbs(self.eps_at(stats.step - 1) * self.estimate), stats.step)


@MIXERS.register("exp3")
class Exp3(Bandit):
    """Exp3 with the loss as reward, as in ODM's code.

    R_i <- R_i + (loss_i / 10) / p_i for the sources drawn;
    p = (1 - K eps_t) gibbs(eps R) + eps_t, where eps is that of the previous update (1/K at first).
    The 10 is from the code.

    Source  Exp3WeightUpdater, data_sampling_utils.py:354-453 of online-data-mixing.
    """

    kind = "exp3"
    collects = False
    per_source = ("shares", "rejected", "reward")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        eps: float | None = None,
        scale: float = 0.1,
    ) -> None:
        super().__init__(sources, prior=prior, eps=eps)
        if not 0 < scale < math.inf:
            raise ConfigError(f"scale: expected > 0, got {scale}; the authors' code uses 0.1")
        self.scale = scale
        self.reward = np.zeros(len(self.sources))

    def estimates(self) -> Vector:
        """The sums of rewards."""
        return self.reward

    def update(self, stats: Stats) -> None:
        """Add the step's rewards, then update the shares."""
        means, usable = self.losses(stats)
        drawn = usable & (self.shares > 0)
        self.reward = self.reward + np.divide(
            self.scale * means, self.shares, out=np.zeros(len(means)), where=drawn
        )
        self.explore(gibbs(self.eps * self.reward), stats.step)


@MIXERS.register("naive-validation")
class NaiveValidation(Bandit):
    """Held-out loss as reward.

    C_i <- C_i + (v_i - min v) / (max v - min v); p = (1 - K eps_t) gibbs(eps C) + eps_t.
    Learns on steps with a `val_loss`, each of which costs an evaluation of every source. Equal
    losses add nothing.

    Source  NaiveValidationWeightUpdater, data_sampling_utils.py:530-621 of online-data-mixing.
    """

    kind = "naive-validation"
    needs = frozenset({"val_loss"})
    collects = False
    per_source = ("shares", "rejected", "reward")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__(sources, prior=prior, eps=eps)
        self.reward = np.zeros(len(self.sources))

    def estimates(self) -> Vector:
        """The sums of rewards."""
        return self.reward

    def update(self, stats: Stats) -> None:
        """Add the evaluation's rewards, if any, then update the shares."""
        if stats.val_loss is None:
            return
        values = vector(stats.val_loss, len(self.sources), "val_loss", stats.step).copy()
        good = self.usable(values, np.ones(len(values), bool))
        if not good.any():
            return
        low = values[good].min()
        high = values[good].max()
        if high > low:
            self.reward = self.reward + np.where(good, (values - low) / (high - low), 0.0)
        self.explore(gibbs(self.eps * self.reward), stats.step)


@MIXERS.register("odm")
class Odm(Bandit):
    """Castalia's variant of Online Data Mixing: a bias-corrected running mean of perplexity.

    R_i <- R_i + c_i (r_i - R_i) for the sources drawn, with c_i = (1 - a) / (1 - a ** n_i) at the
    n_i-th drawing and r_i = exp(loss_i - ref_i). c_i removes the bias of the initial value
    (Kingma & Ba 2015, section 3).
    q: a source not drawn yet keeps its prior share, the others divide the rest in proportion to R;
    p = (1 - K eps_t) q + eps_t.
    It learns during warm-up. One step changes an R_i by at most a factor sqrt(guard), so a single
    spike changes no share by more than a factor `guard`.

    reward     "ppl" as above, or "loss": r_i = max(loss_i - ref_i, 0).
    reference  (K,) loss that each source is expected to reach, in nats a token; 0 by default.
    power      q proportional to R_i ** power; above 1 sharpens, 0 is uniform.
    """

    kind = "odm"
    per_source = ("shares", "rejected", "estimate", "drawn", "fading")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        smoothing: float = 0.9,
        eps: float | None = None,
        reward: str = "ppl",
        reference: ArrayLike | Mapping[str, float] | None = None,
        power: float = 1.0,
        guard: float = ODM_GUARD,
    ) -> None:
        super().__init__(sources, prior=prior, eps=eps)
        if reward not in ("ppl", "loss"):
            raise ConfigError(f"reward: expected ppl or loss, got {reward!r}")
        if not guard > 1 or not power >= 0:
            raise ConfigError(
                f"odm: expected guard > 1 and power >= 0, got guard {guard} and power {power}"
            )
        self.smoothing = check_smoothing(smoothing)
        self.reward = reward
        self.power = power
        # A share is R_i over the sum. If R_i grows and the others shrink, each by sqrt(guard) at
        # most, the share changes by guard at most.
        self.factor = math.sqrt(guard)
        self.reference: Vector | None = None
        if reference is not None:
            self.reference = by_source(reference, self.sources, "reference")
        self.estimate = np.ones(len(self.sources))
        self.drawn = np.zeros(len(self.sources), np.int64)
        # a ** n_i, the weight that the initial value still has.
        self.fading = np.ones(len(self.sources))
        self.loaded()

    def loaded(self) -> None:
        """Set `news` (a source was never drawn) and `settled` (no bias correction is left)."""
        self.news = bool((self.drawn == 0).any())
        self.settled = bool(self.fading.max() < SETTLED)

    def update(self, stats: Stats) -> None:
        """Update the running means, then the shares."""
        means, usable = self.losses(stats)
        if not usable.any():
            return
        rewards = self.rewards(means)
        pull: Vector | float = 1 - self.smoothing
        if not self.settled:
            pull = (1 - self.smoothing) / (1 - self.fading * self.smoothing)
        moved = self.estimate + pull * (rewards - self.estimate)
        moved = np.minimum(
            np.maximum(moved, self.estimate / self.factor), self.estimate * self.factor
        )
        if self.news:
            # The first reward of a source is taken whole: there is no estimate yet to guard.
            moved = np.where(self.drawn > 0, moved, np.maximum(rewards, np.finfo(float).tiny))
        self.estimate = np.where(usable, moved, self.estimate)
        self.drawn = self.drawn + usable
        if not self.settled:
            self.fading = np.where(usable, self.fading * self.smoothing, self.fading)
            self.loaded()
        self.explore(self.learned(), stats.step)

    def estimates(self) -> Vector:
        """The running means; NaN for a source that was never drawn."""
        return np.where(self.drawn > 0, self.estimate, np.nan)

    def rewards(self, means: Vector) -> Vector:
        """r_i of every source, drawn or not."""
        excess = means
        if self.reference is not None:
            excess = means - self.reference
        if self.reward == "ppl":
            return np.exp(excess)
        return np.maximum(excess, 0.0)

    def learned(self) -> Vector:
        """q: prior shares for sources not drawn yet, the rest proportional to the estimates."""
        raised = self.estimate
        if self.power != 1:
            raised = self.estimate**self.power
        if not self.news:
            return raised / raised.sum()
        known = np.where(self.drawn > 0, raised, 0.0)
        waiting = np.where(self.drawn > 0, 0.0, self.prior)
        return waiting + (1 - waiting.sum()) * known / known.sum()


def check_smoothing(smoothing: float) -> float:
    """Return the weight of the past in a running mean.

    Raises  ConfigError outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing: expected in [0, 1), got {smoothing}; 0.9 is usual")
    return smoothing
