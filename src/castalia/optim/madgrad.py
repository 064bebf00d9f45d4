"""MADGRAD: dual averaging with a cube root."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from castalia.optim.base import Member, StateTensor
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import CUBE_ROOT

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class MadgradConfig(OptimConfig):
    """MADGRAD: dual averaging with a cube root. Weight decay 0 is its usual value."""

    kind: Literal["madgrad"] = "madgrad"
    """Name of the optimizer."""
    lr: NonNegativeFloat = 1e-3
    """Peak learning rate, reached at the end of warmup; 0 updates nothing, for a dry run."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of every parameter that the family does not exempt (biases and norms)."""
    momentum: float = Field(0.9, gt=0, lt=1)
    """Weight of the parameters before the step in those after it."""
    eps: PositiveFloat = 1e-6
    """Added to the cube root of the sum of squares."""
    decoupled: bool = True
    """Shrink the weights by the decay, as GPT-NeoX's madgrad_wd; false adds it to the gradient."""


@OPTIMIZERS.register("madgrad")
class Madgrad(Member):
    """s += l * g; v += l * g^2; p = momentum * p + (1 - momentum) * (x0 - s / (cbrt(v) + eps)),
    with l = lr * sqrt(updates + 1) and the start weights x0.

    Source  Defazio and Jelassi 2021, arXiv:2101.11075, algorithm 1.
    """

    Config = MadgradConfig
    by_width = CUBE_ROOT

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """The sums of gradients and of their squares, and the start weights."""
        return {
            "grad_sum_sq": StateTensor(),
            "s": StateTensor(),
            "x0": StateTensor(start="weights"),
        }

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here: pytorch-optimizer's has one count of updates for all parameters, which
        neither a checkpoint nor a step of one parameter at a time can set."""
        from castalia.optim.madgrad_step import MadgradStep

        return MadgradStep(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            eps=config.eps,
            decoupled=config.decoupled,
        )

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """The number of updates."""
        from castalia.optim.walk import step_counter

        return step_counter(updates)
