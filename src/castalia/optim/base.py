"""`Member`: what an optimizer declares to be one of OPTIMIZERS. Needs no torch until it is
built."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from castalia.optim.config import OptimConfig
from castalia.optim.widths import WidthPowers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}
"""Bytes of one number, without asking torch."""


class Weight(NamedTuple):
    """A parameter that trains, as the shape rules see it: whole, whatever the layout."""

    name: str
    shape: tuple[int, ...]
    hidden: bool
    """A matrix of a block, or a stack of those of its experts: neither an embedding, nor the head,
    nor a vector."""


Shape = tuple[int, ...] | None


def same(weight: Weight) -> Shape:
    """The parameter's own shape."""
    return weight.shape


class StateTensor(NamedTuple):
    """A tensor that an optimizer keeps for each parameter it trains."""

    dtype: str = "float32"
    shape: Callable[[Weight], Shape] = same
    """Its shape for a parameter; None where the parameter has none of it."""
    whole: bool = False
    """Whether every rank holds all of it, as of statistics of rows and columns. Otherwise it is cut
    as the parameter, whose dimensions are then multiples of its own."""
    start: Literal["zeros", "weights"] = "zeros"
    """Its values before the first step: zeros, or a copy of the weights."""
    saved: bool = True
    """Whether a checkpoint has it under `optim.`."""

    def bytes_of(self, weight: Weight) -> int:
        """Memory that it takes for a parameter; the cost estimates count with this."""
        shape = self.shape(weight)
        return 0 if shape is None else ITEM_BYTES[self.dtype] * math.prod(shape)


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
    sharded: ClassVar[bool] = True
    """Whether it is right where ranks share a parameter; otherwise several ranks are refused."""
    averaged: ClassVar[str | None] = None
    """Suffix of the state tensor that a checkpoint, a validation and an export take for the
    weights; None where they are the parameters themselves."""

    @classmethod
    def width_powers(cls, config: Any) -> WidthPowers | None:
        """`by_width`, where an option of the optimizer decides it."""
        return cls.by_width

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

    @classmethod
    def restored(cls, optimizer: Any) -> None:
        """Called when all state is in place, new or loaded, and after a validation: derive the
        parameters where they follow from the state."""
        return None

    @classmethod
    def objection(cls, weight: Weight, local: tuple[int, ...]) -> str | None:
        """Why a part of the shape `local` of this parameter cannot be updated, or None.

        Asked on each rank whose part is smaller than the whole.
        """
        return None
