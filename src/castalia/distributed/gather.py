"""Parts of one tensor put together, differentiably."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Torch 2.13 renamed both."""


def gather(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all processes of `group` laid end to end along `dim`, in the order of their ranks.

    Each process's gradient of the whole is taken as an addend: the backward sums them and keeps this process's part.
    """
    whole: Tensor = Gather.apply(part, dim, group)
    return whole


class Gather(torch.autograd.Function):
    """All-gather; its backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        """The whole."""
        ctx.dim, ctx.group = dim, group
        parts = part.new_empty(group.size(), *part.shape)
        ALL_GATHER(parts.flatten(0, 1), part.contiguous(), group=group)
        return torch.cat(parts.unbind(), dim)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None, None]:
        """This process's part of the sum over the processes."""
        parts = torch.stack(d_whole.chunk(ctx.group.size(), ctx.dim))
        part = torch.empty_like(parts[0])
        REDUCE_SCATTER(part, parts.flatten(0, 1), group=ctx.group)
        return part, None, None
