"""Attention on q, k, v: the module, and `attend`, which chooses the kernel.

Shapes: B batch, T tokens held here, C width, H query heads, K key and value heads (H a multiple of
K), D width of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from castalia.models.context import Context, RowShare
from castalia.models.parts.causal_attention import causal_attention
from castalia.models.parts.rotary import rotate_heads
from castalia.models.state import KVCache
from castalia.models.tiles import KEEP


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Attention of T tokens over all that they may see, by the kernel that fits the pass.

    Shapes  q (B, H, T, D), k and v (B, K, T, D), not yet rotated; views of a fused activation will
            do -> (B, T, H * D). Under tensor parallelism H and K are the heads held here.
    """
    # The rotation belongs in here: the CPU kernel rotates its own copy of q and k in place, where
    # a step before it would cost one more copy of both and keep it for the backward.
    if context.share is not None:
        return attend_shared(q, k, v, context, context.share)
    # Our kernel is for training on a CPU. It has no place for a bias, whose gradient would need the
    # whole matrix of scores, and single queries of generation have nothing to skip.
    if context.state is None and q.device.type == "cpu" and context.bias is None:
        cos, sin = context.rope or (None, None)
        return by_blocks(q, k, v, cos, sin, context.mask, [0])
    if context.rope is not None:
        q = rotate_heads(q, context.rope)
        k = rotate_heads(k, context.rope)
    causal = context.mask is None
    if context.state is not None:
        assert isinstance(context.state, KVCache)
        k, v = context.state.append(k, v)
        # A single query follows all cached keys and sees each of them; is_causal aligns the
        # triangle at the upper left and would show it the first key only.
        causal = causal and q.shape[2] > 1
    mask = context.mask
    if context.bias is not None:
        mask = biased_mask(context.bias.to(q.dtype), mask, causal)
        causal = False
    y_BHTD = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y_BHTD.transpose(1, 2).flatten(2)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, context: Context, share: RowShare) -> Tensor:
    """`attend` under context parallelism: this rank's queries over the keys of whole rows."""
    # Rotated before the exchange: each rank knows the positions of its own keys.
    if context.rope is not None:
        q = rotate_heads(q, context.rope)
        k = rotate_heads(k, context.rope)
    # One collective for both, because its start-up time counts. Only the K heads travel; they are
    # repeated for the query heads inside the kernels.
    k, v = share.gather(torch.stack([k, v]), 3).unbind()
    starts = share.starts(q.shape[2])
    if q.device.type == "cpu" and context.bias is None:
        return by_blocks(q, k, v, None, None, context.mask, starts)
    y_BHTD = chunks_by_kernel(q, k, v, context.mask, starts, context.bias)
    return y_BHTD.transpose(1, 2).flatten(2)


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
) -> Tensor:
    """The CPU kernel; see `causal_attention` for the shapes."""
    # Long rows compute their probabilities again: kept, they would grow with the square of T.
    keep = torch.is_grad_enabled() and k.shape[2] <= KEEP * q.shape[3]
    y_BTC: Tensor = causal_attention(q, k, v, cos, sin, mask, starts, keep)[0]
    return y_BTC


def biased_mask(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The bias, with -inf where a query may not see a key.

    causal  hides later keys where there is no mask; the queries are then the last of the keys.
    """
    if mask is None and causal:
        T, keys = bias.shape[-2:]
        mask = torch.ones(T, keys, dtype=torch.bool, device=bias.device).tril(keys - T)
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf)


def chunks_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    starts: Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of equal chunks of a row by torch's kernels.

    Shapes  q (B, H, T, D), k and v (B, K, keys, D), mask and bias over all keys -> (B, H, T, D).
    """
    outputs = []
    n = q.shape[2] // len(starts)
    # One call for each chunk, over the keys up to its end. In one call for all, the early chunk
    # would look at as many keys as the late one.
    for number, start in enumerate(starts):
        keys = start + n
        rows = slice(number * n, (number + 1) * n)
        own_mask = None if mask is None else mask[:, :, rows, :keys]
        if bias is not None:
            visible = biased_mask(bias[:, :, rows, :keys].to(q.dtype), own_mask, causal=True)
        else:
            visible = causal_lower_right(n, keys) if own_mask is None else own_mask
        y = F.scaled_dot_product_attention(
            q[:, :, rows],
            k[:, :, :keys],
            v[:, :, :keys],
            attn_mask=visible,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(y)
    return torch.cat(outputs, 2)


def split_fused(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, D), views of an activation (B, T, H * 3 * D) in GPT-NeoX's order.

    The head count is left to `view`: under tensor parallelism a rank holds fewer. Unbinding the dim
    of q, k, v makes the backward one `stack`, the only copy between the kernel and the projection.
    """
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, -1, 3, head_dim).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention with one fused projection whose rows are in GPT-NeoX's order.

    Row (3 * head + c) * D + d of the weight is dimension d of c of q, k, v. The order is a matter
    of this weight alone: q, k and v leave it as views.
    """

    def __init__(self, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.out = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # The order of the weight's rows ends here; kernels and state see q, k and v.
        q, k, v = split_fused(self.qkv(x_BTC), self.head_dim)
        y_BTC: Tensor = self.out(attend(q, k, v, context))
        return y_BTC

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Empty keys and values for `batch` rows of at most `length` tokens."""
        return KVCache((batch, self.num_heads, length, self.head_dim), dtype, device)
