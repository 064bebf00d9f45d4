"""Channels that ranks of tensor parallelism divide, and the parameters of those held here."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


class ChannelShare(Protocol):
    """This rank's part of the channels, heads or groups; `HeadShare` of castalia.models is one."""

    @property
    def size(self) -> int:
        """Ranks that share them."""

    def of(self, count: int) -> slice:
        """Which of `count` groups are here; fewer than ranks have each group on neighbours."""

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks; differentiable."""


class AllChannels:
    """The share of a rank that holds all of them."""

    size = 1

    def of(self, count: int) -> slice:
        """See `ChannelShare`."""
        return slice(0, count)

    def total(self, values: Tensor) -> Tensor:
        """See `ChannelShare`."""
        return values


ALL = AllChannels()


class BareMatrix(nn.Module):
    """Weight (outputs, inputs) and bias of a product that the module around it computes, each rank
    of tensor parallelism with its own part.

    Not a Linear: adapters, quantized weights and fp8 change how a Linear multiplies, and would pass
    by this one.
    """

    bias: nn.Parameter
    """Of a matrix that has one."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs))


def held(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds, as a plain tensor."""
    if not isinstance(parameter, DTensor):
        return parameter
    placements = [Partial() if p.is_replicate() else p for p in parameter.placements]
    # Of a parameter that every rank holds, each rank's gradient is that of its own channels.
    return parameter.to_local(grad_placements=placements)


def decayed(state: Tensor, decay: Tensor) -> Tensor:
    """A state times its decay, which broadcasts to it.

    Without gradients the state is overwritten: for one token a new one costs as much as the rest.
    """
    return state * decay if torch.is_grad_enabled() else state.mul_(decay)


def narrowed(x: Tensor) -> Tensor:
    """x in the dtype of autocast, if it is on: each matrix that reads it would keep a copy."""
    kind = x.device.type
    # On the meta device, where shapes and operations are counted, there is no autocast.
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
