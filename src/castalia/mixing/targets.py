"""Mixers that follow the excess of a loss over a target: dynamic batch loading and DoReMi."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, by_source, gibbs
from castalia.mixing.stats import Stats, vector


class Multiplicative(Mixer):
    """Base: exponentiated gradient, w_i <- (1 - c) w_i exp(rate score_i) / sum + c / K.

    rate   step size. least: c, the mass spread evenly.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        prior: ArrayLike | Mapping[str, float] | None = None,
        rate: float = 1.0,
        least: float = 1e-3,
    ) -> None:
        super().__init__(sources, prior=prior)
        if not 0 <= least <= 1 or not 0 < rate < np.inf:
            raise ConfigError(
                f"mixer {self.kind!r}: expected 0 <= least <= 1 and rate > 0, got {least} and"
                f" {rate}"
            )
        self.rate = rate
        self.least = least

    def step_by(self, scores: Vector) -> None:
        """Multiply the shares, normalize them, and mix in the uniform floor."""
        # A share of 0 has the logarithm -inf and stays 0.
        with np.errstate(divide="ignore"):
            raised = gibbs(np.log(self.shares) + self.rate * scores)
        self.shares = (1 - self.least) * raised + self.least / len(raised)


@MIXERS.register("dbl")
class DynamicBatchLoading(Multiplicative):
    """More of the sources whose held-out loss is far above its target.

    Updates on steps with a `val_loss`: score_i = val_loss_i - target_i, or with `clamp` its
    positive part. The authors' code does not clamp, and uses rate 1 and least 1e-4.

    target  (K,) held-out loss that each source should reach, in nats a token.
    Source  Xia et al. 2023 (Sheared LLaMA), arXiv:2310.06694, algorithm 1; llmshearing's
            dynamic_loading_callback.py.
    """

    kind = "dbl"
    needs = frozenset({"val_loss"})

    def __init__(
        self,
        sources: Sequence[str],
        *,
        target: ArrayLike | Mapping[str, float] | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
        rate: float = 1.0,
        least: float = 1e-4,
        clamp: bool = False,
    ) -> None:
        super().__init__(sources, prior=prior, rate=rate, least=least)
        if target is None:
            raise ConfigError(
                "mixer 'dbl' needs target=, the held-out loss in nats a token that each source"
                " should reach"
            )
        self.target = by_source(target, self.sources, "target")
        self.clamp = clamp

    def update(self, stats: Stats) -> None:
        """Step by the distances to the targets, if the step brought an evaluation."""
        if stats.val_loss is None:
            return
        values = vector(stats.val_loss, len(self.sources), "val_loss", stats.step).copy()
        good = self.usable(values, np.ones(len(values), bool))
        over = np.where(good, values - self.target, 0.0)
        if self.clamp:
            over = np.maximum(over, 0.0)
        self.step_by(over)


@MIXERS.register("doremi")
class Doremi(Multiplicative):
    """More of the sources whose loss is far above a reference model's.

    score_i is the mean over the tokens of max(loss - reference loss, 0), from `Stats.excess_sum`.
    Without it, score_i is max(mean loss - mean reference loss, 0), from `Stats.ref_loss_sum` or
    `reference`. A source that was not drawn keeps its last score. The result of DoReMi is the
    average of the shares over the run (`Average`).

    reference  (K,) the reference model's loss in nats a token.
    Source  Xie et al. 2023, arXiv:2305.10429, algorithm 1; rate 1 and least 1e-3 are the paper's
            eta and c.
    """

    kind = "doremi"
    needs = frozenset({"train_loss", "ref_loss"})
    per_source = ("shares", "rejected", "score")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        reference: ArrayLike | Mapping[str, float] | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
        rate: float = 1.0,
        least: float = 1e-3,
    ) -> None:
        super().__init__(sources, prior=prior, rate=rate, least=least)
        self.reference: Vector | None = None
        if reference is not None:
            self.reference = by_source(reference, self.sources, "reference")
        self.score = np.zeros(len(self.sources))

    def update(self, stats: Stats) -> None:
        """Update the scores of the sources drawn, then step by all scores."""
        means, usable = self.losses(stats)
        excess, drawn = self.excess(stats, means)
        good = self.usable(excess, drawn & usable)
        self.score = np.where(good, np.maximum(excess, 0.0), self.score)
        if drawn.any():
            self.step_by(self.score)

    def estimates(self) -> Vector:
        """The scores."""
        return self.score

    def excess(self, stats: Stats, means: Vector) -> tuple[Vector, np.ndarray]:
        """Excess over the reference, (K,) nats a token, and (K,) which sources have tokens.

        Raises  ConfigError if neither the stats nor the mixer has a reference.
        """
        tokens = vector(stats.tokens, len(means), "tokens", stats.step)
        # The most exact source of the excess first.
        if stats.excess_sum is not None:
            sums = vector(stats.excess_sum, len(means), "excess_sum", stats.step)
            return sums / np.maximum(tokens, 1), tokens > 0
        if stats.ref_loss_sum is not None:
            sums = vector(stats.ref_loss_sum, len(means), "ref_loss_sum", stats.step)
            return means - sums / np.maximum(tokens, 1), tokens > 0
        if self.reference is None:
            raise ConfigError(
                "mixer 'doremi' needs reference= losses, or ref_loss_sum or excess_sum in its Stats"
            )
        return means - self.reference, tokens > 0
