"""Parameters of channels that ranks of tensor parallelism divide."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

Total = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks that share the channels; differentiable."""


def alone(values: Tensor) -> Tensor:
    """The sum over the ranks of a rank that holds all channels."""
    return values


def held(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds, as a plain tensor."""
    if not isinstance(parameter, DTensor):
        return parameter
    placements = [Partial() if p.is_replicate() else p for p in parameter.placements]
    # Of a parameter that every rank holds, each rank's gradient is that of its own channels.
    return parameter.to_local(grad_placements=placements)
