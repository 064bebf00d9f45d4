"""Rotary position embedding: the tables, and turning queries and keys inside the fused QKV activation."""

from typing import NamedTuple

import torch
from torch import Tensor

from castalia.models.config import TransformerConfig


class Rope(NamedTuple):
    """Tables of one forward pass, float32 (1 or B, 1, T, R), the axis of size 1 standing for the heads.

    R is the rotary width of a head. Both halves of the last axis hold the same angles; sin is negative in the first.
    """

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: TransformerConfig, device: torch.device) -> Tensor:
    """theta_j = base^(-2j/R) for j = 0..R/2-1, float32 (R/2,).

    Source  Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents = (
        torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
        / config.rotary_dim
    )
    return 1.0 / (config.rotary_emb_base**exponents)


def rope_tables(config: TransformerConfig, positions: Tensor) -> Rope:
    """Tables for `positions`; stateless, hence the same on every device, layout and after meta construction.

    Shapes  positions (1 or B, T) int64 -> cos, sin float32 (1 or B, 1, T, R).
    With rope_numerics neox_v1_fp16 the frequency, the angle, its cosine and sine are each rounded to float16, as in
    GPT-NeoX v1.0, where .half() on the model took the frequency buffer along; below position 2048 the phase of
    GPT-NeoX-20B is off by up to 0.34 rad.
    """
    theta = inverse_frequencies(config, positions.device)
    if config.rope_numerics == "neox_v1_fp16":
        angles = positions.to(torch.float16)[:, None, :, None] * theta.to(torch.float16)
    else:
        angles = positions.float()[:, None, :, None] * theta
    cos, sin = angles.cos().float(), angles.sin().float()
    return Rope(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (j, j + R/2) of the last axis by their angles: x (..., B, H, T, R), any dtype -> the same, float32.

    With -sin for sin it turns back, which is also the gradient.
    """
    x, cos, sin = x.float(), cos.float(), sin.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_heads(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the first R dimensions of every head: x (B, H, T, D) -> the same shape and dtype, contiguous.

    They turn in halves, dimension j pairing with j + R/2; the other dimensions pass unchanged.
    """
    R = rope.cos.shape[-1]
    turned = rotate(x[..., :R], *rope).to(x.dtype)
    return torch.cat((turned, x[..., R:]), -1)
