"""Rotary position embedding: the tables of a pass, and the rotation of queries and keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from castalia.models.config import TransformerConfig
from castalia.models.parts.frequencies import frequencies


class Rope(NamedTuple):
    """Tables of one forward pass, float32 (1 or B, 1, T, R); the axis of size 1 is the heads'.

    R is the rotary width of a head. Both halves of the last axis hold the same angles. sin is
    negative in the first half, so that a rotation is two products and a sum.
    """

    cos: Tensor
    sin: Tensor


def rope_tables(config: TransformerConfig, positions: Tensor, length: "int | Tensor" = 0) -> Rope:
    """The tables of `positions`.

    Shapes  positions (1 or B, T) int64 -> cos, sin float32 (1 or B, 1, T, R).
    length  tokens of the row, which dynamic scaling follows; a tensor like positions has a length
            for each token.
    """
    # Computed in every pass: a buffer would be garbage after `to_empty` and lose bits in `.half()`.
    theta, factor = frequencies(config, length, positions.device)
    if config.rope_numerics == "neox_v1_fp16":
        # GPT-NeoX v1.0 rounded frequency, angle, cosine and sine to float16, because .half() on the
        # model converted the frequency buffer too. Below position 2048 the phase of GPT-NeoX-20B is
        # off by up to 0.34 rad, and models trained so must be run so.
        angles = positions.to(torch.float16)[:, None, :, None] * theta.to(torch.float16)
    else:
        angles = positions.float()[:, None, :, None] * theta
    cos = angles.cos().float()
    sin = angles.sin().float()
    if factor != 1.0:
        cos = cos * factor
        sin = sin * factor
    return Rope(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (j, j + R/2) of the last axis by their angles.

    Shapes  x (..., B, H, T, R) of any dtype -> the same shape, float32.
    With -sin in place of sin it rotates back, which is also the gradient.
    """
    # In float32 whatever the model computes in: bf16 cosines would shift far positions.
    x = x.float()
    cos = cos.float()
    sin = sin.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_heads(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the first R dimensions of every head, x (B, H, T, D) -> the same shape and dtype.

    Dimension j pairs with j + R/2. Dimensions from R on pass unchanged. The result is contiguous.
    """
    R = rope.cos.shape[-1]
    turned = rotate(x[..., :R], *rope).to(x.dtype)
    return torch.cat((turned, x[..., R:]), -1)
