"""Rotary position embedding: the tables, and turning queries and keys inside the fused QKV activation."""

from typing import NamedTuple

import torch
from torch import Tensor

from castalia.models.config import ModelConfig


class Rope(NamedTuple):
    """Cosines and sines of one forward pass, shape (1 or B, T, 1, 1, R / 2) where R is the rotary width of a head.

    The two axes of size 1 stand for the head and for query or key, so that the tables multiply (B, T, H, 2, R / 2).
    """

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """theta_j = base^(-2j/R) for j = 0..R/2-1, float32 (R/2,).

    Source  Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device) / config.rotary_dim
    return 1.0 / (config.rotary_emb_base**exponents)


def rope_tables(config: ModelConfig, positions: Tensor) -> Rope:
    """Tables for `positions`; stateless, hence the same on every device, layout and after meta construction.

    Shapes  positions (1 or B, T) int64 -> cos, sin float32 (1 or B, T, 1, 1, R/2).
    With rope_numerics neox_v1_fp16 the frequency, the angle, its cosine and sine are each rounded to float16, as in
    GPT-NeoX v1.0, where .half() on the model took the frequency buffer along; below position 2048 the phase of
    GPT-NeoX-20B is off by up to 0.34 rad.
    """
    theta = inverse_frequencies(config, positions.device)
    if config.rope_numerics == "neox_v1_fp16":
        angles = positions.to(torch.float16)[..., None, None, None] * theta.to(torch.float16)
        return Rope(angles.cos().float(), angles.sin().float())
    angles = positions.float()[..., None, None, None] * theta
    return Rope(angles.cos(), angles.sin())


def split_qkv(qkv: Tensor, head_dim: int, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of the fused activation, queries and keys turned by `rope`.

    Shapes  qkv (B, T, H * 3 * head_dim) in GPT-NeoX order (3 * head + c) * head_dim + d -> three (B, H, T, head_dim).
    Only the first R dimensions of a head turn, in halves: dimension j pairs with j + R/2.
    """
    B, T, _ = qkv.shape
    qkv_BTHCD = qkv.view(B, T, -1, 3, head_dim)
    if rope is not None:
        half = rope.cos.shape[-1]
        qk = qkv_BTHCD[..., :2, :]
        a, b = qk[..., :half], qk[..., half : 2 * half]
        cos, sin = rope.cos.to(qkv.dtype), rope.sin.to(qkv.dtype)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin, qk[..., 2 * half :]), dim=-1)
        q, k = turned.unbind(3)
        v = qkv_BTHCD[..., 2, :]
    else:
        q, k, v = qkv_BTHCD.unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
