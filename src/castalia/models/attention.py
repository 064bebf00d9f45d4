"""Causal attention for training on a CPU, as custom operators: one block of queries at a time, by matrix products.

PyTorch's CPU kernel for scaled_dot_product_attention computes its tiles with small products and spends most of a small
model's step in its backward; whole-block products and softmax are three times as fast. A block of QUERIES queries looks
at the keys up to its own end, so that nearly half of the square is never computed. The probabilities of short rows are
kept for the backward, those of long rows computed again, so memory stays linear in T (as in Dao et al. 2022,
arXiv:2205.14135). Scores are rounded to the dtype of the activations before the softmax, as GPT-NeoX's baddbmm does.
torch.compile sees each operator as one node.

Where processes share each row (`SequencePart`), a process has queries of a few pieces of the row and the keys of all of
it; `attention_of_pieces` and `pieces_by_kernel` are causal attention from there.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from castalia.models.rotary import rotate
from castalia.models.tiles import QUERIES


class SequencePart(Protocol):
    """The tokens of each row that this process holds, in equal pieces, and how it sees those of the others."""

    def starts(self, T: int) -> list[int]:
        """Place in the row where each piece of the T tokens held here begins."""

    def positions(self, T: int) -> Tensor:
        """Place in the row of each of the T tokens held here, int64 (1, T)."""

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """What all processes hold of a tensor along `dim`, in the order of the row; differentiable."""


Span = tuple[int, int, int]
"""First and last + 1 query of a block, and the number of keys that its last query sees."""


def spans(T: int, starts: Sequence[int] = (0,)) -> Iterator[Span]:
    """Blocks of T queries that are equal pieces of a row, each beginning at one of `starts`."""
    size = T // len(starts)
    for first, start in zip(range(0, T, max(1, size)), starts, strict=False):
        for at in range(0, size, QUERIES):
            n = min(QUERIES, size - at)
            yield first + at, first + at + n, start + at + n


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
            mask bool (B, 1, n, keys) or None; out (B * H, n, keys).
    """
    torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=out)
    n, keys = q.shape[1], k.shape[1]
    if mask is None:
        out[:, :, keys - n :].add_(hide[:n, :n])
    else:
        out.view(mask.shape[0], -1, n, keys).masked_fill_(~mask, -torch.inf)
    return torch.softmax(out, -1, out=out)


def rows_of(mask: Tensor | None, start: int, end: int, keys: int) -> Tensor | None:
    """What the queries start..end-1 see of the first `keys` keys."""
    return None if mask is None else mask[:, :, start:end, :keys]


def attend(
    qkv: Sequence[Tensor], mask: Tensor | None, starts: Sequence[int], keep: bool
) -> tuple[Tensor, Tensor]:
    """y like q, and all probabilities, flat (empty unless `keep`). q (B * H, T, D); k, v (B * H, keys, D)."""
    q, k, v = qkv
    rows, T, _ = q.shape
    kept = q.new_empty(kept_size(rows, T, starts) if keep else 0)
    scratch = kept if keep else q.new_empty(rows * min(QUERIES, T) * k.shape[1])
    y, hide, offset = torch.empty_like(q), future(q), 0
    for start, end, keys in spans(T, starts):
        size = rows * (end - start) * keys
        p = scratch[offset : offset + size].view(rows, end - start, keys)
        probabilities(q[:, start:end], k[:, :keys], hide, rows_of(mask, start, end, keys), p)
        torch.bmm(p, v[:, :keys], out=y[:, start:end])
        offset += size if keep else 0
    return y, kept


def attend_backward(
    dy: Tensor,
    qkv: Sequence[Tensor],
    gradients: Sequence[Tensor],
    kept: Tensor,
    mask: Tensor | None,
    starts: Sequence[int],
) -> None:
    """Add the gradients of q, k and v to `gradients`; dy like q."""
    (q, k, v), (dq, dk, dv) = qkv, gradients
    rows, T, D = q.shape
    scratch = q.new_empty(2, rows * min(QUERIES, T) * k.shape[1])
    hide, offset, scale = future(dy), 0, D**-0.5
    for start, end, keys in spans(T, starts):
        shape, size = (rows, end - start, keys), rows * (end - start) * keys
        if len(kept):
            p, offset = kept[offset : offset + size].view(shape), offset + size
        else:
            p = scratch[1, :size].view(shape)
            probabilities(q[:, start:end], k[:, :keys], hide, rows_of(mask, start, end, keys), p)
        dp = torch.bmm(
            dy[:, start:end], v[:, :keys].transpose(1, 2), out=scratch[0, :size].view(shape)
        )
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
        dv[:, :keys].baddbmm_(p.transpose(1, 2), dy[:, start:end])
        dk[:, :keys].baddbmm_(ds.transpose(1, 2), q[:, start:end], alpha=scale)
        dq[:, start:end].baddbmm_(ds, k[:, :keys], alpha=scale)


@torch.library.custom_op("castalia::causal_attention", mutates_args=())
def causal_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    head_dim: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a row over itself, rotary embedding included.

    Shapes  qkv (B, T, 3 * C) in GPT-NeoX order; cos, sin as in `Rope` or None; mask bool (B, 1, T, T), True where a
            query may see a key, within the lower triangle, or None for causal -> y (B, T, C), and for the backward
            the turned queries, keys and values (3, B, H, T, D) and all probabilities, flat (empty unless `keep`).
    """
    B, T, _ = qkv.shape
    parts = qkv.view(B, T, -1, 3, head_dim).permute(3, 0, 2, 1, 4)
    turned = parts.clone(
        memory_format=torch.contiguous_format
    )  # never the input itself, which `turn` would change
    if cos is not None and sin is not None:
        turn(turned, cos, sin)
    y, kept = attend(turned.flatten(1, 2).unbind(0), mask, (0,), keep)
    return y.view(B, -1, T, head_dim).transpose(1, 2).reshape(B, T, -1), turned, kept


def kept_size(rows: int, T: int, starts: Sequence[int] = (0,)) -> int:
    """Probabilities of all blocks, rows = B * H."""
    return rows * sum((end - start) * keys for start, end, keys in spans(T, starts))


@causal_attention.register_fake
def _(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    head_dim: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    rows = width // (3 * head_dim)
    turned = qkv.new_empty(3, B, rows, T, head_dim)
    return (
        qkv.new_empty(B, T, width // 3),
        turned,
        qkv.new_empty(kept_size(B * rows, T) if keep else 0),
    )


@torch.library.custom_op("castalia::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    dy: Tensor,
    turned: Tensor,
    kept: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Gradient of `causal_attention` with respect to qkv; dy (B, T, C) -> (B, T, 3 * C)."""
    _, B, _, T, D = turned.shape
    dy = dy.reshape(B, T, -1, D).transpose(1, 2).reshape(-1, T, D)
    gradients = torch.zeros_like(turned)
    attend_backward(
        dy, turned.flatten(1, 2).unbind(0), gradients.flatten(1, 2).unbind(0), kept, mask, (0,)
    )
    if cos is not None and sin is not None:
        turn(gradients, cos, -sin)
    return gradients.permute(1, 3, 2, 0, 4).reshape(B, T, -1)


@causal_attention_backward.register_fake
def _(
    dy: Tensor,
    turned: Tensor,
    kept: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    return dy.new_empty(*dy.shape[:2], 3 * dy.shape[2])


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep for the backward what it needs."""
    _, cos, sin, mask, _, _ = inputs
    ctx.save_for_backward(output[1], output[2], cos, sin, mask)


def differentiate(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward as autograd calls it; only y has a gradient."""
    return causal_attention_backward(dy, *ctx.saved_tensors), None, None, None, None, None


causal_attention.register_autograd(differentiate, setup_context=remember)


@torch.library.custom_op("castalia::attention_of_pieces", mutates_args=())
def attention_of_pieces(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, starts: list[int], keep: bool
) -> tuple[Tensor, Tensor]:
    """Causal attention of queries that are equal pieces of a row, the pieces beginning at `starts`.

    Shapes  q (B, H, T, D) and k, v (B, H, keys, D), turned already; mask bool (B, 1, T, keys), True where a query may
            see a key, never a later one, or None for causal -> y like q, and all probabilities, flat, for the backward
            (empty unless `keep`).
    """
    y, kept = attend([x.flatten(0, 1).contiguous() for x in (q, k, v)], mask, starts, keep)
    return y.view(q.shape), kept


@attention_of_pieces.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, starts: list[int], keep: bool
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    y = q.new_empty(q.shape)
    return y, q.new_empty(kept_size(B * H, T, starts) if keep else 0)


@torch.library.custom_op("castalia::attention_of_pieces_backward", mutates_args=())
def attention_of_pieces_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    mask: Tensor | None,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_of_pieces` with respect to q, k and v; dy like q."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    flat, sums = (
        [x.flatten(0, 1).contiguous() for x in (q, k, v)],
        [x.flatten(0, 1) for x in (dq, dk, dv)],
    )
    attend_backward(dy.flatten(0, 1).contiguous(), flat, sums, kept, mask, starts)
    return dq, dk, dv


@attention_of_pieces_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    mask: Tensor | None,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def remember_pieces(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for the backward what it needs."""
    *parts, mask, ctx.starts, _ = inputs
    ctx.save_for_backward(*parts, output[1], mask)


def differentiate_pieces(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward as autograd calls it."""
    return *attention_of_pieces_backward(dy, *ctx.saved_tensors, ctx.starts), None, None, None


attention_of_pieces.register_autograd(differentiate_pieces, setup_context=remember_pieces)


def pieces_by_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, starts: Sequence[int]
) -> Tensor:
    """`attention_of_pieces` by torch's kernels, for a GPU: one call a piece, the keys up to its end."""
    made, n = [], q.shape[2] // len(starts)
    for number, start in enumerate(starts):
        keys, first = start + n, number * n
        bias = causal_lower_right(n, keys) if mask is None else mask[:, :, first : first + n, :keys]
        piece = q[:, :, first : first + n]
        made.append(
            F.scaled_dot_product_attention(piece, k[:, :, :keys], v[:, :, :keys], attn_mask=bias)
        )
    return torch.cat(made, 2)
