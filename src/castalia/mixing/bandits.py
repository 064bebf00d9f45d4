"""Mixers that treat sources as arms of a bandit whose reward is the loss: Online Data Mixing and its kin.

Source  Albalak et al. 2023, arXiv:2312.02406 (ODM), its paper and its code, which differ; Auer et al. 2002 (Exp3).
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
"""Most that one step multiplies a share by under `odm` unless told otherwise."""
SETTLED = 1e-17
"""1 less this is 1 in float64."""


def exploration(step: int, count: int) -> float:
    """eps_t = min(1/K, sqrt(ln K / (K t))): the share that every source has for certain; 0 when K is 1.

    K eps_t is the part of the data that is mixed uniformly: with 1,000 sources all of it up to step 6,908.
    """
    if count == 1:
        return 0.0
    return min(1 / count, math.sqrt(math.log(count) / (count * step))) if step > 0 else 1 / count


class Bandit(Mixer):
    """Base: an exploration share eps that falls with the step, and the last two of its values."""

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
            raise ConfigError(f"eps: expected between 0 and 1/K = {1 / count:g}, got {eps}")
        self.fixed_eps = eps
        self.eps = 1 / count

    def eps_at(self, step: int) -> float:
        """The exploration share of a step."""
        return exploration(step, len(self.sources)) if self.fixed_eps is None else self.fixed_eps

    def explore(self, shares: Vector, step: int) -> None:
        """shares <- (1 - K eps_t) shares + eps_t."""
        self.eps = self.eps_at(step)
        self.shares = (1 - len(shares) * self.eps) * shares + self.eps

    def notes(self, steps: int) -> list[str]:
        """Whether exploration leaves little to learning: more than half of the data over more than a fifth of a run."""
        count = len(self.sources)
        if count * self.eps_at(max(steps // 5, 1)) <= 0.5:
            return []
        return [
            f"mixer {self.kind!r}: with {count} sources {count * self.eps_at(max(steps // 5, 1)):.0%} of the data is"
            f" mixed uniformly at a fifth of the run and {count * self.eps_at(steps):.0%} at its end; eps= sets less"
        ]

    def report(self) -> dict[str, float]:
        """K eps: the part of the data that is mixed uniformly, whatever was learned."""
        return {"uniform_share": round(len(self.sources) * self.eps, 6)}


class RunningMean(Bandit):
    """Base of the two published forms: a running mean for each source, 0 at first, nothing learned in warm-up."""

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

    def mean_with(self, rewards: Vector, seen: NDArray[np.bool_]) -> Vector:
        """The running means after `rewards` of the sources that were seen."""
        moved = self.smoothing * self.estimate + (1 - self.smoothing) * rewards
        return np.where(seen, moved, self.estimate)


@MIXERS.register("odm-repo")
class OdmRepo(RunningMean):
    """ODM as its authors' code ran it: shares in proportion to a running mean of perplexity.

    R_i <- a R_i + (1 - a) exp(loss_i) for the sources drawn, R_i = 0 at first; p = (1 - K eps_t) R / sum R + eps_t.
    Nothing is learned in warm-up, so right after it most sources stand at eps_t.

    Source  SmoothedMeanWeightUpdater.group_update, megatron/data/data_sampling_utils.py:501-528 of online-data-mixing.
    """

    kind = "odm-repo"

    def update(self, stats: Stats) -> None:
        """One step of the running mean, then its shares."""
        means, seen = self.losses(stats)
        self.estimate = self.mean_with(np.exp(means), seen)
        total = self.estimate.sum()
        if total > 0:
            self.explore(self.estimate / total, stats.step)


@MIXERS.register("odm-paper")
class OdmPaper(RunningMean):
    """ODM as published: a Gibbs distribution over an importance-weighted running mean of the loss.

    R_i <- a R_i + (1 - a) loss_i / p_i for the sources drawn; p = (1 - K eps_t) gibbs(eps_(t-1) R) + eps_t.
    The exponent vanishes with eps, so the mixture becomes nearly uniform; kept for comparison.

    Source  algorithm 1 of arXiv:2312.02406.
    """

    kind = "odm-paper"

    def update(self, stats: Stats) -> None:
        """One step of the running mean, then its shares."""
        means, seen = self.losses(stats)
        weighted = np.divide(
            means, self.shares, out=np.zeros(len(means)), where=seen & (self.shares > 0)
        )
        self.estimate = self.mean_with(weighted, seen)
        self.explore(gibbs(self.eps_at(stats.step - 1) * self.estimate), stats.step)


@MIXERS.register("exp3")
class Exp3(Bandit):
    """Exp3 with the loss as reward, as ODM's code has it.

    R_i <- R_i + (loss_i / 10) / p_i for the sources drawn; p = (1 - K eps_t) gibbs(eps R) + eps_t, where eps is that
    of the update before (1/K at first). The 10 is the code's.

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
            raise ConfigError(f"scale: expected > 0, got {scale}; 0.1 is the code's")
        self.scale = scale
        self.reward = np.zeros(len(self.sources))

    def estimates(self) -> Vector:
        """The sums of rewards."""
        return self.reward

    def update(self, stats: Stats) -> None:
        """Add the step's rewards, then take the shares."""
        means, seen = self.losses(stats)
        drawn = seen & (self.shares > 0)
        self.reward = self.reward + np.divide(
            self.scale * means, self.shares, out=np.zeros(len(means)), where=drawn
        )
        self.explore(gibbs(self.eps * self.reward), stats.step)


@MIXERS.register("naive-validation")
class NaiveValidation(Bandit):
    """Held-out loss as reward: C_i += (v_i - min v) / (max v - min v); p = (1 - K eps_t) gibbs(eps C) + eps_t.

    Learns on the steps that bring `val_loss`; each costs an evaluation of every source. All equal adds nothing.

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
        """Add the evaluation's rewards, if there was one, then take the shares."""
        if stats.val_loss is None:
            return
        values = vector(stats.val_loss, len(self.sources), "val_loss", stats.step).copy()
        good = self.usable(values, np.ones(len(values), bool))
        if not good.any():
            return
        low, high = values[good].min(), values[good].max()
        if high > low:
            self.reward = self.reward + np.where(good, (values - low) / (high - low), 0.0)
        self.explore(gibbs(self.eps * self.reward), stats.step)


@MIXERS.register("odm")
class Odm(Bandit):
    """Online Data Mixing, ours: shares in proportion to an unbiased running mean of perplexity.

    R_i <- R_i + c_i (r_i - R_i) for the sources drawn, c_i = (1 - a) / (1 - a ** n_i) after n_i drawings, which is the
    running mean of weight `a` without the pull of its start (Kingma & Ba 2015, section 3); r_i = exp(loss_i - ref_i).
    Sources not drawn yet hold their prior share, the others divide the rest: q; p = (1 - K eps_t) q + eps_t.
    It learns in warm-up, and a R_i that stands moves at most by a factor sqrt(guard) a step, so that a single spike
    changes no share by more than a factor `guard`.

    reward     "ppl" as above, or "loss": r_i = max(loss_i - ref_i, 0).
    reference  (K,) nats a token that the source is expected to reach; 0 without one.
    power      q in proportion to R_i ** power; above 1 tilts more, 0 is uniform.
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
        self.smoothing, self.reward, self.power = check_smoothing(smoothing), reward, power
        self.factor = math.sqrt(guard)
        self.reference = (
            None if reference is None else by_source(reference, self.sources, "reference")
        )
        self.estimate = np.ones(len(self.sources))
        self.drawn = np.zeros(len(self.sources), np.int64)
        self.fading = np.ones(len(self.sources))
        self.loaded()

    def loaded(self) -> None:
        """`news`: some source was never drawn; `settled`: no running mean feels its start any more."""
        self.news = bool((self.drawn == 0).any())
        self.settled = bool(self.fading.max() < SETTLED)

    def update(self, stats: Stats) -> None:
        """One step of the running means, then their shares."""
        means, seen = self.losses(stats)
        if not seen.any():
            return
        rewards = self.rewards(means)
        pull = (
            (1 - self.smoothing) / (1 - self.fading * self.smoothing)
            if not self.settled
            else 1 - self.smoothing
        )
        moved = self.estimate + pull * (rewards - self.estimate)
        moved = np.minimum(
            np.maximum(moved, self.estimate / self.factor), self.estimate * self.factor
        )
        if self.news:
            moved = np.where(self.drawn > 0, moved, np.maximum(rewards, np.finfo(float).tiny))
        self.estimate = np.where(seen, moved, self.estimate)
        self.drawn = self.drawn + seen
        if not self.settled:
            self.fading = np.where(seen, self.fading * self.smoothing, self.fading)
            self.loaded()
        self.explore(self.learned(), stats.step)

    def estimates(self) -> Vector:
        """The running means; NaN for a source that was never drawn."""
        return np.where(self.drawn > 0, self.estimate, np.nan)

    def rewards(self, means: Vector) -> Vector:
        """r_i of every source, drawn or not."""
        over = means if self.reference is None else means - self.reference
        return np.exp(over) if self.reward == "ppl" else np.maximum(over, 0.0)

    def learned(self) -> Vector:
        """q: prior shares for the sources not drawn yet, the rest in proportion to the estimates."""
        raised = self.estimate if self.power == 1 else self.estimate**self.power
        if not self.news:
            return raised / raised.sum()
        known = np.where(self.drawn > 0, raised, 0.0)
        waiting = np.where(self.drawn > 0, 0.0, self.prior)
        return waiting + (1 - waiting.sum()) * known / known.sum()


def check_smoothing(smoothing: float) -> float:
    """The weight of the past in a running mean.

    Raises  ConfigError outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(
            f"smoothing: expected between 0 and 1 (not 1), got {smoothing}; 0.9 is usual"
        )
    return smoothing
