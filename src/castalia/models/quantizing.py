"""Weights of linear layers rounded to int8 or int4, as the native engine and frozen bases of
adapters both store them.

    int8   one float32 scale a row: w = q * scale, |q| <= 127
    int4   one bfloat16 scale for 32 inputs of a row: w = q * scale, -8 <= q <= 7
"""

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale in int4, as in llama.cpp's Q4_0."""
INT4_CANDIDATES = torch.linspace(0.75, 1.1, 15)
"""Scales tried for a group, as shares of the scale that just reaches its largest weight."""


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a row: (N, K) float32 -> (N, K) int8, (N,) float32.

    A row of zeros has scale 0.
    """
    scale = weight.abs().amax(1) / 127
    # A product with the inverse, as step.cpp does, so that both round alike.
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (weight * inverse[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int4 with a scale for each 32 inputs.

    Shapes  (N, K) float32 -> (N, K) int8 in [-8, 7], (N, K / 32) bfloat16.

    As in llama.cpp's Q4_0, the weight of largest magnitude becomes -8. Of INT4_CANDIDATES times
    that scale, the one with the least squared error is taken.
    """
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.full_like(largest, torch.inf)
    best_q = torch.zeros_like(groups, dtype=torch.int8)
    best_scale = torch.zeros_like(largest, dtype=torch.bfloat16)
    for share in INT4_CANDIDATES.tolist():
        # Rounded to its stored precision first, so that the error below is the error of the file.
        scale = (largest / -8 * share).to(torch.bfloat16)
        step = scale.float()
        q = (groups * torch.where(step != 0, 1 / step, 0.0)).round_().clamp_(-8, 7)
        error = (q * step).sub_(groups).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_q = torch.where(better, q.to(torch.int8), best_q)
        best_scale = torch.where(better, scale, best_scale)
    return best_q.flatten(1), best_scale[..., 0]
