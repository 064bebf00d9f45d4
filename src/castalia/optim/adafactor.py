"""Adafactor: a second moment out of its row and column means."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from castalia.optim.base import Member, Shape, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import RELATIVE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class AdafactorConfig(OptimConfig):
    """Adafactor: almost no state; the rate is relative to the size of each parameter."""

    kind: Literal["adafactor"] = "adafactor"
    """Name of the optimizer."""
    lr: NonNegativeFloat = 1e-2
    """Peak learning rate, a share of the parameter's root mean square; never above 1 / sqrt(n) at
    update n."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of every parameter that the family does not exempt (biases and norms)."""
    beta2_decay: float = Field(-0.8, lt=0)
    """The decay of the second moment at update n is 1 - n ** beta2_decay."""
    eps: PositiveFloat = 1e-7
    """Least root of the second moment."""
    smallest: PositiveFloat = 1e-3
    """Least root mean square that a parameter counts with, so that zeros can grow."""
    threshold: PositiveFloat = 1.0
    """Largest root mean square of an update before the rate."""


def rows(weight: Weight) -> Shape:
    """One number for each row of a matrix."""
    return (weight.shape[0], 1) if len(weight.shape) == 2 else None


def columns(weight: Weight) -> Shape:
    """One number for each column of a matrix."""
    return (1, weight.shape[1]) if len(weight.shape) == 2 else None


def unfactored(weight: Weight) -> Shape:
    """The shape of anything but a matrix."""
    return None if len(weight.shape) == 2 else weight.shape


@OPTIMIZERS.register("adafactor")
class Adafactor(Member):
    """v = rows * columns / mean(rows), of squared gradients; u = g / sqrt(v), at most of root mean
    square 1; p -= min(lr, 1 / sqrt(n)) * max(smallest, rms(p)) * u + lr * weight_decay * p.

    Source  Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5, in torch's form.
    """

    Config = AdafactorConfig
    by_width = RELATIVE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """Means of rows and columns of a matrix, the full second moment of anything else."""
        return {
            "row_var": StateTensor(shape=rows, whole=True),
            "col_var": StateTensor(shape=columns, whole=True),
            "variance": StateTensor(shape=unfactored),
        }

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here: torch's takes the means of a rank's own part."""
        from castalia.optim.adafactor_step import AdafactorStep

        return AdafactorStep(
            groups,
            lr=config.lr,
            beta2_decay=config.beta2_decay,
            eps=config.eps,
            smallest=config.smallest,
            threshold=config.threshold,
        )

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """The number of updates."""
        from castalia.optim.walk import step_counter

        return step_counter(updates)
