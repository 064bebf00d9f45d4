"""Causal attention for training on a CPU, as two custom operators: one block of queries at a time, by matrix products.

PyTorch's CPU kernel for scaled_dot_product_attention computes its tiles with small products and spends most of a small
model's step in its backward; whole-block products and softmax are three times as fast. A block of QUERIES queries looks
at the keys up to its own end, so that nearly half of the square is never computed. The probabilities of short rows are
kept for the backward, those of long rows computed again, so memory stays linear in T (as in Dao et al. 2022,
arXiv:2205.14135). Scores are rounded to the dtype of the activations before the softmax, as GPT-NeoX's baddbmm does.
torch.compile sees each operator as one node.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from castalia.models.pieces import QUERIES
from castalia.models.rotary import rotate


def blocks(T: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 query of each block."""
    return ((start, min(start + QUERIES, T)) for start in range(0, T, QUERIES))


def turn(turned: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys in place. turned (3, B, H, T, D); cos, sin as in `Rope`."""
    rotary = turned[:2, ..., : cos.shape[-1]]
    rotary.copy_(rotate(rotary, cos, sin))


def future(qkv: Tensor) -> Tensor:
    """0 or -inf, (QUERIES, QUERIES): added to the last scores of a block it hides the keys after each query."""
    return torch.full((QUERIES, QUERIES), -torch.inf, dtype=qkv.dtype).triu_(1)


def probabilities(q: Tensor, k: Tensor, hide: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """Softmax of the scores of one block of queries, written to `out`.

    Shapes  q (B * H, n, D), k (B * H, keys, D), the queries being the last n of the keys; hide as `future` makes it;
            mask as in `causal_attention`; out (B * H, n, keys).
    """
    torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=out)
    n, end = q.shape[1], k.shape[1]
    start = end - n
    if mask is None:
        out[:, :, start:].add_(hide[:n, :n])
    else:
        visible = mask[:, :, start:end, :end]
        out.view(mask.shape[0], -1, n, end).masked_fill_(~visible, -torch.inf)
    return torch.softmax(out, -1, out=out)


@torch.library.custom_op("castalia::causal_attention", mutates_args=())
def causal_attention(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, head_dim: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a row over itself, rotary embedding included.

    Shapes  qkv (B, T, 3 * C) in GPT-NeoX order; cos, sin as in `Rope` or None; mask bool (B, 1, T, T), True where a
            query may see a key, within the lower triangle, or None for causal -> y (B, T, C), and for the backward
            the turned queries, keys and values (3, B, H, T, D) and all probabilities, flat (empty unless `keep`).
    """
    B, T, _ = qkv.shape
    parts = qkv.view(B, T, -1, 3, head_dim).permute(3, 0, 2, 1, 4)
    turned = parts.clone(memory_format=torch.contiguous_format)  # never the input itself, which `turn` would change
    if cos is not None and sin is not None:
        turn(turned, cos, sin)
    q, k, v = turned.flatten(1, 2).unbind(0)
    kept = qkv.new_empty(kept_size(len(q), T) if keep else 0)
    scratch = kept if keep else qkv.new_empty(len(q) * min(QUERIES, T) * T)
    y, hide, offset = torch.empty_like(q), future(qkv), 0
    for start, end in blocks(T):
        size = len(q) * (end - start) * end
        p = scratch[offset : offset + size].view(len(q), end - start, end)
        torch.bmm(probabilities(q[:, start:end], k[:, :end], hide, mask, p), v[:, :end], out=y[:, start:end])
        offset += size if keep else 0
    return y.view(B, -1, T, head_dim).transpose(1, 2).reshape(B, T, -1), turned, kept


def kept_size(rows: int, T: int) -> int:
    """Probabilities of all blocks, rows = B * H."""
    return rows * sum((end - start) * end for start, end in blocks(T))


@causal_attention.register_fake
def _(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, head_dim: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    rows = width // (3 * head_dim)
    turned = qkv.new_empty(3, B, rows, T, head_dim)
    return qkv.new_empty(B, T, width // 3), turned, qkv.new_empty(kept_size(B * rows, T) if keep else 0)


@torch.library.custom_op("castalia::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    dy: Tensor, turned: Tensor, kept: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gradient of `causal_attention` with respect to qkv; dy (B, T, C) -> (B, T, 3 * C)."""
    _, B, _, T, D = turned.shape
    q, k, v = turned.flatten(1, 2).unbind(0)
    dy = dy.reshape(B, T, -1, D).transpose(1, 2).reshape(-1, T, D)
    gradients = torch.zeros_like(turned)
    dq, dk, dv = gradients.flatten(1, 2).unbind(0)
    scratch = turned.new_empty(2, len(q) * min(QUERIES, T) * T)
    hide, offset, scale = future(dy), 0, D**-0.5
    for start, end in blocks(T):
        shape, size = (len(q), end - start, end), len(q) * (end - start) * end
        if len(kept):
            p, offset = kept[offset : offset + size].view(shape), offset + size
        else:
            p = probabilities(q[:, start:end], k[:, :end], hide, mask, scratch[1, :size].view(shape))
        dp = torch.bmm(dy[:, start:end], v[:, :end].transpose(1, 2), out=scratch[0, :size].view(shape))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
        dv[:, :end].baddbmm_(p.transpose(1, 2), dy[:, start:end])
        dk[:, :end].baddbmm_(ds.transpose(1, 2), q[:, start:end], alpha=scale)
        dq[:, start:end].baddbmm_(ds, k[:, :end], alpha=scale)
    if cos is not None and sin is not None:
        turn(gradients, cos, -sin)
    return gradients.permute(1, 3, 2, 0, 4).reshape(B, T, -1)


@causal_attention_backward.register_fake
def _(dy: Tensor, turned: Tensor, kept: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None) -> Tensor:
    return dy.new_empty(*dy.shape[:2], 3 * dy.shape[2])


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep for the backward what it needs."""
    _, cos, sin, mask, _, _ = inputs
    ctx.save_for_backward(output[1], output[2], cos, sin, mask)


def differentiate(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward as autograd calls it; only y has a gradient."""
    return causal_attention_backward(dy, *ctx.saved_tensors), None, None, None, None, None


causal_attention.register_autograd(differentiate, setup_context=remember)
