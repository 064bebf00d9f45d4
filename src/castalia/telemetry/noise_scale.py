"""The gradient noise scale: about the batch size up to which more rows save as many steps.

Of a gradient of B targets E|G_B|^2 = |G|^2 + tr(S) / B, where G is the true gradient and S the
covariance of a single target's. Two batch sizes give both terms, and B_simple = tr(S) / |G|^2.
Source  McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; equation 2.9.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from castalia.optim.updater import Updater
from castalia.telemetry.statistic import PassesOf, Statistic
from castalia.telemetry.step_passes import StepPasses


class Estimate(NamedTuple):
    """One unbiased estimate of both terms; either may be negative."""

    gradient: float
    """|G|^2."""
    noise: float
    """tr(S)."""


def estimate(small: float, small_square: float, big: float, big_square: float) -> Estimate:
    """The two terms of the squared norms of gradients of `small` and of `big` targets.

    Source  McCandlish et al. 2018, equations A.2 and A.3.
    """
    gradient = (big * big_square - small * small_square) / (big - small)
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return Estimate(gradient, noise)


class Averages:
    """Exponential averages of the two terms, apart.

    Their ratio is taken last: the ratio of single estimates is biased, and its denominator may be 0
    or below. Both begin at 0 with the same decay, so that the start cancels in the ratio.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.gradient = 0.0
        self.noise = 0.0
        self.weight = 0.0

    def add(self, new: Estimate) -> None:
        """Count one estimate; what is not finite, as after an overflow of fp16, is left out."""
        if not (math.isfinite(new.gradient) and math.isfinite(new.noise)):
            return
        kept = self.decay
        self.gradient = kept * self.gradient + (1 - kept) * new.gradient
        self.noise = kept * self.noise + (1 - kept) * new.noise
        self.weight = kept * self.weight + (1 - kept)

    @property
    def scale(self) -> float:
        """B_simple in targets; NaN while the averages are not both positive."""
        if self.gradient <= 0 or self.noise <= 0:
            return math.nan
        return self.noise / self.gradient


class NoiseScale(Statistic):
    """The noise scale from the gradients of a part and of all of a step's rows.

    On one rank the part is the first of several micro-batches, whose gradient is there anyway. In
    all other cases the part goes through the model once more before the step, and its gradient is
    dropped: summing over ranks between micro-batches would change the rounding of the run.
    """

    def __init__(
        self, every: int, decay: float, passes: StepPasses, updater: Updater, single: bool
    ) -> None:
        """`single` is whether there is one rank."""
        super().__init__(every)
        self.averages = Averages(decay)
        self.passes = passes
        self.updater = updater
        self.single = single
        self.small_square = math.nan
        self.targets = (0.0, 0.0)

    def begin(self, passes: PassesOf) -> None:
        """Measure the part, or have it measured after the first micro-batch."""
        batches = passes.micro_batches
        weights = self.passes.weights(batches)
        # A single micro-batch is halved.
        # One micro-batch is halved: the estimate needs two sizes of batches.
        if len(batches) > 1:
            part = list(batches[:1])
        else:
            part = [batch.every(0, 2) for batch in batches]
        part_weights = self.passes.weights(part)
        big = self.passes.total_weight(batches, weights, passes.loss_scale)
        small = self.passes.total_weight(part, part_weights, passes.loss_scale)
        self.small_square = math.nan
        self.targets = (small, big)
        if not 0 < small < big:
            return
        if self.single and len(batches) > 1:
            # Its gradient is divided by the targets of all.
            factor = big / small / passes.loss_scale
            self.passes.after_first = lambda: self.read(factor)
            return
        self.passes.train(part, part_weights, passes.loss_scale / small, passes.step - 1)
        self.read(1 / passes.loss_scale)
        self.updater.zero_grad()

    def read(self, factor: float) -> None:
        """Keep the squared norm of `factor` times the gradients at hand."""
        self.passes.after_first = None
        self.small_square = (float(self.passes.gradient_norm()) * factor) ** 2

    def before_update(self, norm: float) -> None:
        """Count the step."""
        small, big = self.targets
        if not math.isfinite(self.small_square):
            return
        self.averages.add(estimate(small, self.small_square, big, norm**2))
        # Equal on all ranks already; nothing to reduce.
        self.sums = torch.zeros(0, dtype=torch.float64)

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`noise_scale/...`."""
        averages = self.averages
        count = averages.weight or 1.0
        return {
            "noise_scale": {
                "tokens": averages.scale,
                "gradient": averages.gradient / count,
                "noise": averages.noise / count,
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        averages = self.averages
        return {name: getattr(averages, name) for name in ("gradient", "noise", "weight")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        for name, value in state.items():
            setattr(self.averages, name, value)
