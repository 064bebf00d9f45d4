"""Causal attention for training on a CPU: a custom operator that works by blocks of queries, where
castalia.attention has no compiled code.

PyTorch's CPU kernel for scaled_dot_product_attention computes its tiles with small products and
spends most of a small model's step in its backward; whole-block products and softmax are three
times as fast. A block of QUERIES queries looks at the keys up to its own end, so nearly half of the
square is never computed. The probabilities of short rows are kept for the backward and those of
long rows are computed again, so memory stays linear in T (as in Dao et al. 2022, arXiv:2205.14135).
Scores are rounded to the dtype of the activations before the softmax, as GPT-NeoX's baddbmm does.
torch.compile sees the operator as one node.

Shapes: B batch, T time, H query heads, K key and value heads, G = H / K query heads to a key head,
D width of a head. Query head h reads key head h // G, as in Ainslie et al. 2023, arXiv:2305.13245.
Inside, the G queries of one key head and position are neighbours: (B * K, T * G, D). A block of
positions is then a slice, each block is one matrix product whatever G is, and the gradients of keys
and values are summed over the group by the same product.

Under context parallelism the queries are equal chunks of a row (`starts`) and the keys are the
whole row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.models.parts.rotary import rotate
from castalia.models.tiles import QUERIES


class QueryBlock(NamedTuple):
    """Queries start..end - 1 of the T held here, and the number of keys that the last one sees."""

    start: int
    end: int
    keys: int


class FlatHeads(NamedTuple):
    """Flat contiguous copies: q (B * K, T * G, D); k, v (B * K, keys, D)."""

    q: Tensor
    k: Tensor
    v: Tensor


def spans(T: int, starts: Sequence[int] = (0,)) -> Iterator[QueryBlock]:
    """Blocks of T queries that are equal chunks of a row, one beginning at each of `starts`."""
    size = T // len(starts)
    for number, start in enumerate(starts):
        first = number * size
        for at in range(0, size, QUERIES):
            n = min(QUERIES, size - at)
            yield QueryBlock(first + at, first + at + n, start + at + n)


def kept_size(rows: int, T: int, starts: Sequence[int] = (0,)) -> int:
    """Probabilities of all blocks of `rows` = B * H rows of queries."""
    return rows * sum((span.end - span.start) * span.keys for span in spans(T, starts))


def future(like: Tensor, group: int) -> Tensor:
    """0 or -inf, (QUERIES * group, QUERIES): hides later keys in the last scores of a block."""
    # Added once for a block, which is cheaper than a mask over all of its keys.
    square = torch.full((QUERIES, QUERIES), -torch.inf, dtype=like.dtype).triu_(1)
    if group == 1:
        return square
    return square.repeat_interleave(group, 0)


def probabilities(q: Tensor, k: Tensor, hide: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """Softmax of the scores of one block of queries, written to `out`.

    Shapes  q (B * K, n * G, D), k (B * K, keys, D), the queries being the last n of the keys; hide
            as `future` makes it; mask bool (B, 1, n, keys) or None; out (B * K, n * G, keys).
    """
    # beta=0 ignores what `out` holds, NaN included; alpha scales the scores in the product itself.
    torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=out)
    queries, keys = out.shape[1:]
    if mask is None:
        # All queries of the block see the keys before it; only the square at its end is cut.
        n = queries // (len(hide) // QUERIES)
        out[:, :, keys - n :].add_(hide[:queries, :n])
    else:
        by_group = out.view(mask.shape[0], -1, mask.shape[2], queries // mask.shape[2], keys)
        by_group.masked_fill_(~mask[:, :, :, None], -torch.inf)
    return torch.softmax(out, -1, out=out)


def rows_of(mask: Tensor | None, span: QueryBlock) -> Tensor | None:
    """The part of the mask that one block sees."""
    if mask is None:
        return None
    return mask[:, :, span.start : span.end, : span.keys]


def forward_blocks(
    heads: FlatHeads, T: int, mask: Tensor | None, starts: Sequence[int], keep: bool
) -> tuple[Tensor, Tensor]:
    """y like heads.q, and the probabilities of all blocks, flat (empty unless `keep`)."""
    q, k, v = heads
    rows = len(q)
    group = q.shape[1] // max(1, T)
    # One allocation: all probabilities if they are kept, else scratch that the blocks share.
    if keep:
        buffer = q.new_empty(kept_size(rows * group, T, starts))
    else:
        buffer = q.new_empty(rows * group * min(QUERIES, T) * k.shape[1])
    # Every block writes its own rows of y, so nothing has to be zeroed.
    y = torch.empty_like(q)
    hide = future(q, group)
    offset = 0
    for span in spans(T, starts):
        block = slice(span.start * group, span.end * group)
        shape = (rows, block.stop - block.start, span.keys)
        size = rows * shape[1] * span.keys
        p = buffer[offset : offset + size].view(shape)
        probabilities(q[:, block], k[:, : span.keys], hide, rows_of(mask, span), p)
        torch.bmm(p, v[:, : span.keys], out=y[:, block])
        if keep:
            offset += size
    return y, buffer if keep else q.new_empty(0)


def backward_blocks(
    dy: Tensor,
    heads: FlatHeads,
    gradients: FlatHeads,
    T: int,
    kept: Tensor,
    mask: Tensor | None,
    starts: Sequence[int],
) -> None:
    """Add the gradients of q, k and v to `gradients`, which begin at zero; dy like heads.q."""
    q, k, v = heads
    rows = len(q)
    group = q.shape[1] // max(1, T)
    # Scratch for dp of one block and, where probabilities were not kept, for p of the same block.
    scratch = q.new_empty(2, rows * group * min(QUERIES, T) * k.shape[1])
    hide = future(dy, group)
    scale = q.shape[-1] ** -0.5
    offset = 0
    for span in spans(T, starts):
        block = slice(span.start * group, span.end * group)
        shape = (rows, block.stop - block.start, span.keys)
        size = rows * shape[1] * span.keys
        if len(kept):
            p = kept[offset : offset + size].view(shape)
            offset += size
        else:
            p = scratch[1, :size].view(shape)
            probabilities(q[:, block], k[:, : span.keys], hide, rows_of(mask, span), p)
        # y = p v and p = softmax(s), s = q k^T / sqrt(D):
        #   dp = dy v^T    ds = p (dp - sum(p dp))    dv += p^T dy    dk += ds^T q    dq = ds k
        # ds takes the memory of dp. Keys and values collect from every block that sees them.
        dp = scratch[0, :size].view(shape)
        torch.bmm(dy[:, block], v[:, : span.keys].transpose(1, 2), out=dp)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
        gradients.v[:, : span.keys].baddbmm_(p.transpose(1, 2), dy[:, block])
        gradients.k[:, : span.keys].baddbmm_(ds.transpose(1, 2), q[:, block], alpha=scale)
        gradients.q[:, block].baddbmm_(ds, k[:, : span.keys], alpha=scale)


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """A view (B, K, T, G, D) of (B, H, T, D): queries of one key head and position side by side."""
    view: Tensor = x.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    return view


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first R dimensions of every head in place.

    Shapes  x (B, K, T, G, D); cos, sin (1 or B, 1, T, R).
    """
    rotary = x[..., : cos.shape[-1]]
    rotary.copy_(rotate(rotary, cos.unsqueeze(3), sin.unsqueeze(3)))


@torch.library.custom_op("castalia::causal_attention", mutates_args=())
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of a row over itself, rotary embedding included.

    q, k, v   (B, H, T, D) and twice (B, K, keys, D), H a multiple of K; views will do.
    cos, sin  as in `Rope`; None where q and k are rotated already, and keys may exceed T.
    mask      bool (1 or B, 1, T, keys), True where a query may see a key, never a later one; None
              is causal.
    starts    position in the row where each equal chunk of T begins, [0] for whole rows.
    keep      return the probabilities, so that the backward need not compute them again.
    Returns   y (B, T, H * D), and for the backward the rotated q (B, K, T, G, D), k, v and all
              probabilities, flat (empty unless `keep`).
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    # The one copy of the forward. The products need contiguous heads, and rotating in place on the
    # copy costs no other. A clone and not `contiguous`, which may return the input itself.
    heads = [
        x.clone(memory_format=torch.contiguous_format)
        for x in (grouped(q, K), k.unsqueeze(3), v.unsqueeze(3))
    ]
    if cos is not None and sin is not None:
        turn(heads[0], cos, sin)
        turn(heads[1], cos, sin)
    flat = FlatHeads(*(x.view(B * K, -1, D) for x in heads))
    y, kept = forward_blocks(flat, T, mask, starts, keep)
    y = y.view(B, K, T, H // K, D).permute(0, 2, 1, 3, 4).reshape(B, T, H * D)
    return y, heads[0], heads[1].squeeze(3), heads[2].squeeze(3), kept


@causal_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    K = k.shape[1]
    kept = q.new_empty(kept_size(B * H, T, starts) if keep else 0)
    turned = q.new_empty(B, K, T, H // K, D)
    return q.new_empty(B, T, H * D), turned, k.new_empty(k.shape), v.new_empty(v.shape), kept


@torch.library.custom_op("castalia::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_attention` with respect to q (B, H, T, D), k and v (B, K, keys, D).

    q, k, v and kept are the forward's own; dy (B, T, H * D).
    """
    B, K, T, G, D = q.shape
    flat = FlatHeads(*(x.view(B * K, -1, D) for x in (q, k, v)))
    # The layout of q, where the queries of a group are neighbours.
    dy = dy.reshape(B, T, K, G, D).transpose(1, 2).reshape(B * K, T * G, D)
    gradients = [torch.zeros_like(x) for x in (q, k.unsqueeze(3), v.unsqueeze(3))]
    sums = FlatHeads(*(x.view(B * K, -1, D) for x in gradients))
    backward_blocks(dy, flat, sums, T, kept, mask, starts)
    if cos is not None and sin is not None:
        # The gradient of a rotation is the rotation back.
        turn(gradients[0], cos, -sin)
        turn(gradients[1], cos, -sin)
    dq, dk, dv = gradients
    # A single key head needs no copy to reshape, and would leave strides that compiled code, which
    # was told of a contiguous result, refuses.
    dq = dq.transpose(2, 3).reshape(B, K * G, T, D).contiguous()
    return dq, dk.squeeze(3), dv.squeeze(3)


@causal_attention_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    B, K, T, G, D = q.shape
    return q.new_empty(B, K * G, T, D), k.new_empty(k.shape), v.new_empty(v.shape)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward what it needs: the operator's own copies, not its inputs."""
    _, _, _, cos, sin, mask, ctx.starts, _ = inputs
    # The inputs are views of the projection's output, three times as wide as each: saving them
    # would keep that alive beside the copies.
    _, q, k, v, kept = output
    ctx.save_for_backward(q, k, v, kept, cos, sin, mask)
    # Else autograd makes zeros as the gradients of the copies, which nobody uses.
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward as autograd calls it; only y has a gradient."""
    dq, dk, dv = causal_attention_backward(dy, *ctx.saved_tensors, ctx.starts)
    return dq, dk, dv, None, None, None, None, None


causal_attention.register_autograd(differentiate, setup_context=remember)
