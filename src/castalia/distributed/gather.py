"""A differentiable all-gather, and its counterpart."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both collectives; older releases have the second name only.
ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the parts of all ranks of `group` along `dim`, in rank order.

    Each rank's gradient of the result is an addend: the backward sums them over the ranks and
    returns this rank's slice.
    """
    whole: Tensor = Gather.apply(part, dim, group)
    return whole


def sum_and_scatter(addend: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along `dim`, of the sum of the addends of all ranks of `group`.

    The backward gives each rank the gradients of all parts.
    """
    part: Tensor = SumAndScatter.apply(addend, dim, group)
    return part


class Gather(torch.autograd.Function):
    """All-gather; its backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        """The concatenated tensor."""
        ctx.dim = dim
        ctx.group = group
        # The collective concatenates along dim 0 only, so the parts are stacked and cut apart
        # again.
        parts = part.new_empty(group.size(), *part.shape)
        ALL_GATHER(parts.flatten(0, 1), part.contiguous(), group=group)
        return torch.cat(parts.unbind(), dim)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None, None]:
        """This rank's slice of the sum over the ranks."""
        parts = torch.stack(d_whole.chunk(ctx.group.size(), ctx.dim))
        part = torch.empty_like(parts[0])
        REDUCE_SCATTER(part, parts.flatten(0, 1), group=ctx.group)
        return part, None, None


class SumAndScatter(torch.autograd.Function):
    """Reduce-scatter; its backward is an all-gather."""

    @staticmethod
    def forward(ctx: Any, addend: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        """This rank's slice of the sum."""
        ctx.dim = dim
        ctx.group = group
        parts = torch.stack(addend.chunk(group.size(), dim))
        part = torch.empty_like(parts[0])
        REDUCE_SCATTER(part, parts.flatten(0, 1), group=group)
        return part

    @staticmethod
    def backward(ctx: Any, d_part: Tensor) -> tuple[Tensor, None, None]:
        """The slices of all ranks."""
        return gather(d_part, ctx.dim, ctx.group), None, None
