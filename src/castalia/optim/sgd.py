"""Stochastic gradient descent with momentum."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from castalia.optim.base import Member, StateTensor
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import SGD_LIKE

if TYPE_CHECKING:
    import torch


class SGDConfig(OptimConfig):
    """SGD: the gradient alone, with coupled weight decay."""

    kind: Literal["sgd"] = "sgd"
    """Name of the optimizer."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the sum of gradients; 0 keeps no state."""
    nesterov: bool = False
    """Step from where the momentum leads."""


@OPTIMIZERS.register("sgd")
class SGD(Member):
    """b = momentum * b + g + weight_decay * p; p -= lr * b.

    Source  Sutskever et al. 2013, in torch's form, where lr stands outside the sum.
    """

    Config = SGDConfig
    by_width = SGD_LIKE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """The momentum, if there is any."""
        return {"momentum_buffer": StateTensor()} if config.momentum else {}

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """torch's SGD, fused where its parameters are not sharded."""
        import torch

        from castalia.optim.layout import are_plain

        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            fused=are_plain(groups),
        )
