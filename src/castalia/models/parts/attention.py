"""Attention on q, k, v: the module, and `attend`, which chooses the kernel.

Shapes: B batch, T tokens held here, C width, H query heads, K key and value heads (H a multiple of
K), D width of a head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from castalia.attention.fused_attention import fused_attention
from castalia.attention.library import fuses
from castalia.models.config import TransformerConfig
from castalia.models.context import Context, HeadShare, RowShare
from castalia.models.parts.causal_attention import causal_attention
from castalia.models.parts.dropout import Draws, drop_probabilities, project
from castalia.models.parts.flex import attend_in_blocks
from castalia.models.parts.norms import make_head_norm
from castalia.models.parts.rotary import Rope, rotate, rotate_heads
from castalia.models.state import KVCache
from castalia.models.tiles import keeps_probabilities


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Attention of T tokens over all that they may see, by the kernel that fits the pass.

    Shapes  q (B, H, T, D), k and v (B, K, T, D), not yet rotated; views of a fused activation will
            do -> (B, T, H * D). Under tensor parallelism H and K are the heads held here.
    """
    # The rotation belongs in here: the CPU kernel rotates its own copy of q and k in place, where
    # a step before it would cost one more copy of both and keep it for the backward.
    if context.draws is not None and context.draws.attention > 0:
        return attend_plainly(q, k, v, context, context.draws)
    if context.share is not None:
        return attend_shared(q, k, v, context, context.share)
    if context.block_mask is not None:
        return attend_in_blocks(q, k, v, context.block_mask, context.rope)
    # Our kernel is for training on a CPU. It has no place for a bias, whose gradient would need the
    # whole matrix of scores, or a mask of each head, and single queries of generation have nothing
    # to skip.
    if context.state is None and q.device.type == "cpu" and alike(context):
        if context.mask is None and q.shape == k.shape and is_inference():
            return attend_in_place(q, k, v, context.rope)
        return by_blocks(q, k, v, context.rope, context, [0])
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


def is_inference() -> bool:
    """Whether this pass belongs to an engine: a validation of training, which keeps to the kernel
    it is compared with, has no inference mode."""
    # Compiled models are trained, and the compiler does not know the mode.
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
    """Causal attention for inference on a CPU, which rotates q and k where they are."""
    # Without a gradient torch's kernel is the faster one, and reads the views of the projection,
    # which nobody else reads, without a copy.
    if rope is not None:
        for x in (q, k):
            rotary = x[..., : rope.cos.shape[-1]]
            rotary.copy_(rotate(rotary, *rope))
    y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y_BHTD.transpose(1, 2).flatten(2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, context: Context, draws: Draws) -> Tensor:
    """`attend` with all probabilities written out, some of which are dropped."""
    # The kernels have no place for dropout whose bits are ours.
    if context.rope is not None:
        q = rotate_heads(q, context.rope)
        k = rotate_heads(k, context.rope)
    if context.share is not None:
        k, v = context.share.gather(torch.stack([k, v]), 3).unbind()
    K = k.shape[1]
    # Queries of one key head side by side: the products broadcast over them.
    grouped = q.unflatten(1, (K, -1))
    scores = (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2).float()
    scores = scores * q.shape[-1] ** -0.5
    if context.bias is not None:
        scores = scores + context.bias
    seen = context.mask
    if seen is None:
        seen = (draws.keys <= draws.tokens[..., None])[:, None]
    p_BHTK = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).to(q.dtype)
    p_BHTK = drop_probabilities(p_BHTK, draws)
    y_BHTD: Tensor = (p_BHTK.unflatten(1, (K, -1)) @ v[:, :, None]).flatten(1, 2)
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
    if q.device.type == "cpu" and alike(context):
        return by_blocks(q, k, v, None, context, starts)
    y_BHTD = chunks_by_kernel(q, k, v, context.mask, starts, context.bias)
    return y_BHTD.transpose(1, 2).flatten(2)


def alike(context: Context) -> bool:
    """Whether all heads see the same keys, without a bias."""
    return context.bias is None and (context.mask is None or context.mask.shape[1] == 1)


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None,
    context: Context,
    starts: list[int],
) -> Tensor:
    """The CPU kernel; see `causal_attention` for the shapes. `rope` is None for rotated heads."""
    B, H, T, D = q.shape
    cos, sin = rope or (None, None)
    y_BTC: Tensor
    if is_fused(q.dtype, D):
        y_BTC = fused_attention(q, k, v, cos, sin, context.mask, starts)[0]
        return y_BTC
    # Long rows compute their probabilities again: kept, they would grow with the square of T. The
    # bits of the results are the same either way.
    keep = torch.is_grad_enabled() and keeps_probabilities(
        B * H * T, k.shape[2], D, spares=context.spares_memory
    )
    y_BTC = causal_attention(q, k, v, cos, sin, context.mask, starts, keep)[0]
    return y_BTC


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_fused(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether compiled code has these heads; the compiler of models takes the answer as given."""
    # Never measured: where instructions and compilers are the same, all ranks of a run and its
    # resume compute by the same kernel. Elsewhere they differ by rounding.
    return fuses(str(dtype).removeprefix("torch."), head_dim)


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
    """Causal self-attention: projections, norms of queries and keys, and `attend`.

    A fused projection has its rows in GPT-NeoX's order: row (3 * head + c) * D + d of the weight is
    dimension d of c of q, k, v. Otherwise q, k and v are layers of their own, with rows head by
    head. The order is a matter of the weights alone: q, k and v leave them as views.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.kv_heads = config.kv_heads
        self.score_factor = config.score_factor
        self.fused = config.fused_qkv
        queries = config.num_attention_heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, bias=config.has_qkv_bias)
        else:
            self.q = nn.Linear(width, queries, bias=config.has_qkv_bias)
            self.k = nn.Linear(width, keys, bias=config.has_qkv_bias)
            self.v = nn.Linear(width, keys, bias=config.has_qkv_bias)
        self.q_norm = make_head_norm(config, config.num_attention_heads)
        # GPT-NeoX has one norm for both.
        self.k_norm = None if config.qk_norm == "neox" else make_head_norm(config, self.kv_heads)
        self.out = nn.Linear(queries, width, bias=config.attention_bias)
        # Sees what `attend` gets; set by castalia.telemetry while it measures.
        self.observe: Callable[[Tensor, Tensor, Context], None] | None = None

    @property
    def tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the projections, in the words of castalia.distributed."""
        norms = {name: "whole" for name in ("q_norm", "k_norm") if getattr(self, name) is not None}
        if self.fused:
            return {"qkv": "column", "out": "row", **norms}
        # The input is gathered once for all three.
        keys = f"heads:{self.kv_heads}"
        return {"": "gathered", "q": "columns", "k": keys, "v": keys, "out": "row", **norms}

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.fused:
            # The order of the weight's rows ends here; kernels and state see q, k and v.
            q, k, v = split_fused(project(self.qkv, x_BTC, context.draws), self.head_dim)
        else:
            q, k, v = (
                self.heads_of(project(layer, x_BTC, context.draws))
                for layer in (self.q, self.k, self.v)
            )
            k = self.own_keys(k, context.heads)
            v = self.own_keys(v, context.heads)
        if self.q_norm is not None:
            q = self.q_norm(q.transpose(1, 2), context.heads).transpose(1, 2)
            norm = self.k_norm or self.q_norm
            k = norm(k.transpose(1, 2), context.heads).transpose(1, 2)
        if self.score_factor != 1.0:
            # On the queries: no kernel has to know of it, and exports fold it into their weights.
            q = q * self.score_factor
        if self.observe is not None:
            self.observe(q, k, context)
        return project(self.out, attend(q, k, v, context), context.draws)

    def heads_of(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D), a view."""
        # The head count is left to `view`: under tensor parallelism a rank holds fewer.
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def own_keys(self, x_BKTD: Tensor, share: HeadShare) -> Tensor:
        """The key heads that serve the query heads held here."""
        if self.kv_heads >= share.size:
            return x_BKTD
        # With fewer heads than ranks each rank computes all of them, and needs one.
        return x_BKTD[:, share.of(self.kv_heads)]

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Empty keys and values for `batch` rows of at most `length` tokens."""
        return KVCache((batch, self.kv_heads, length, self.head_dim), dtype, device)
