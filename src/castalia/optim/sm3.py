"""SM3: one number for each row and each column in place of a second moment."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from castalia.optim.base import Member, Shape, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import ADAM_LIKE

if TYPE_CHECKING:
    import torch

MOST_DIMS = 4
"""Dimensions of a parameter; convolutions over time have three."""


class SM3Config(OptimConfig):
    """SM3: AdaGrad in the memory of rows and columns; its rate is large and decays by itself."""

    kind: Literal["sm3"] = "sm3"
    """Name of the optimizer."""
    lr: NonNegativeFloat = 0.05
    """Peak learning rate, reached at the end of warmup; 0 updates nothing, for a dry run."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of every parameter that the family does not exempt (biases and norms)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean of updates; 0 keeps none."""
    beta: float = Field(0.0, ge=0, lt=1)
    """Decay of the statistics; 0 sums them, as in the paper."""
    eps: PositiveFloat = 1e-30
    """Added to the statistics under the root."""


def along(dim: int) -> Any:
    """The shape rule of the statistic of dimension `dim`: that size, and 1 elsewhere."""

    def shape(weight: Weight) -> Shape:
        sizes = weight.shape
        if dim >= max(1, len(sizes)):
            return None
        return tuple(size if place == dim else 1 for place, size in enumerate(sizes))

    return shape


@OPTIMIZERS.register("sm3")
class SM3(Member):
    """v = min over the dimensions of their statistics + g^2; each statistic = max of v over the
    other dimensions; p -= lr * (g / sqrt(v) + weight_decay * p).

    Source  Anil et al. 2019, arXiv:1901.11150, SM3-II.
    """

    Config = SM3Config
    by_width = ADAM_LIKE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """A statistic for each dimension, and the momentum if there is any."""
        state = {
            f"accumulator_{dim}": StateTensor(shape=along(dim), whole=True)
            for dim in range(MOST_DIMS)
        }
        if config.momentum:
            state["momentum_buffer"] = StateTensor()
        return state

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here: the libraries' takes the maxima of a rank's own part."""
        from castalia.optim.sm3_step import SM3Step

        return SM3Step(
            groups, lr=config.lr, momentum=config.momentum, beta=config.beta, eps=config.eps
        )
