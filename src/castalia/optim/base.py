"""`Member`: what an optimizer declares to be one of OPTIMIZERS. Needs no torch until it is
built."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from castalia.optim.config import OptimConfig
from castalia.optim.widths import WidthPowers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class StateTensor(NamedTuple):
    """A tensor that an optimizer keeps for each parameter it trains, in the parameter's shape."""

    dtype: str = "float32"
    bytes_per_weight: float = 4.0
    """Memory and disk that it takes; the cost estimates count with this."""


class Member(ABC):
    """One optimizer. A new one is a file with a subclass, registered in OPTIMIZERS.

    The state is declared, so that it exists before the first step, a checkpoint can fill it in
    place on any layout, and memory and disk can be estimated without building anything.
    """

    Config: ClassVar[type[OptimConfig]]
    """Its section of the config: a subclass of OptimConfig with `kind: Literal["its name"] = "its
    name"`."""
    by_width: ClassVar[WidthPowers | None] = None
    """How its learning rates follow the width under μP; None means that nobody worked it out, and
    the optimizer is refused with model.mup."""

    @classmethod
    @abstractmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """Suffix -> state tensor, as `torch.optim.Optimizer.state[parameter]` names them."""

    @classmethod
    @abstractmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """The torch optimizer of some parameter groups, each with `params`, `lr` and
        `weight_decay`."""

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """State that is not saved because it follows from the number of updates, such as Adam's
        step count."""
        return {}
