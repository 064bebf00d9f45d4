"""Products of stacked matrices, each with its own contiguous rows of one input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes that a row of each factor must be a multiple of for the grouped kernel."""


def grouped_product(x_RC: Tensor, weight_EFC: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of expert e times weight[e]^T; the rows lie expert by expert.

    Shapes  x (R, C), weight (E, F, C), counts (E,) int64 with sum R -> (R, F).
    """
    if has_kernel(x_RC, weight_EFC):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        out: Tensor = F.grouped_mm(x_RC, weight_EFC.mT, offs=ends_E)
        return out
    out = SegmentProduct.apply(x_RC, weight_EFC, counts_E)
    return out


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies all segments in one kernel, without the counts on the host."""
    # Elsewhere its function is a loop itself, with a stricter alignment than ours.
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    rows = (x.shape[1], weight.shape[1], weight.shape[2])
    return all(size * x.itemsize % ALIGNMENT == 0 for size in rows)


class SegmentProduct(torch.autograd.Function):
    """The products one after the other.

    One function and not one a segment: the gradient of a stack is then written in place, where
    autograd would add up E tensors as large as the stack.
    """

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, weight_EFC: Tensor, counts_E: Tensor) -> Tensor:
        """(R, C), (E, F, C), (E,) -> (R, F)."""
        counts: list[int] = counts_E.tolist()
        out_RF = x_RC.new_empty(len(x_RC), weight_EFC.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            # A single token leaves most of many experts without rows.
            if count:
                here = slice(start, start + count)
                torch.mm(x_RC[here], weight_EFC[expert].mT, out=out_RF[here])
                start += count
        ctx.save_for_backward(x_RC, weight_EFC)
        ctx.counts = counts
        return out_RF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Of the rows and of the stack."""
        x_RC, weight_EFC = ctx.saved_tensors
        gradient_RF = gradients[0].contiguous().split(ctx.counts)
        x_gradient = None
        weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = torch.empty_like(x_RC)
            into = x_gradient.split(ctx.counts)
            for gradient, weight, out in zip(gradient_RF, weight_EFC, into, strict=True):
                torch.mm(gradient, weight, out=out)
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.empty_like(weight_EFC)
            rows = x_RC.split(ctx.counts)
            for gradient, x, out in zip(gradient_RF, rows, weight_gradient, strict=True):
                torch.mm(gradient.mT, x, out=out)
        return x_gradient, weight_gradient, None
