"""The largest attention logit of each layer: what the softmax sees, scaled, biased and masked.

Logits that grow without bound are the usual sign of an attention that will diverge. The kernels
never form the whole matrix of scores; here they are formed again by blocks of queries, and only the
maximum of each block is kept.
Source  Dehghani et al. 2023, arXiv:2302.05442, section 3.1 (the growth of logits).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from castalia.distributed import World
from castalia.models.context import Context
from castalia.models.parts.attention import Attention
from castalia.models.parts.causal_attention import rows_of, spans
from castalia.models.parts.rotary import rotate_heads
from castalia.telemetry.groups import put
from castalia.telemetry.watch import Watching, plain, recomputes, stages_of


class AttentionLogits(Watching):
    """See the module."""

    def __init__(self, every: int, model: nn.Module, world: World, layers: int) -> None:
        super().__init__(every, model)
        self.world = world
        self.layers = layers

    def install(self) -> list[RemovableHandle]:
        """Observe every attention on this rank."""
        shape = (self.layers,)
        device = self.world.device
        self.largest = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
        handles: list[Any] = []
        for stage in stages_of(self.model):
            for layer, block in stage.layers.named_children():
                attention = getattr(block, "attn", None)
                if isinstance(attention, Attention):
                    attention.observe = partial(self.see, int(layer))
                    handles.append(Observed(attention))
        return handles

    @torch.no_grad()
    def see(self, layer: int, q: Tensor, k: Tensor, context: Context) -> None:
        """Look at the queries and keys of one pass."""
        if not recomputes():
            peak = largest_logit(plain(q), plain(k), context)
            torch.maximum(self.largest[layer], peak.double(), out=self.largest[layer])

    def finish(self) -> None:
        """Hand over the maxima."""
        self.maxima = self.largest
        self.sums = torch.zeros(0, dtype=torch.float64, device=self.world.device)

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`attention_logits/{max,layers/N}`."""
        out: dict[str, Any] = {}
        for layer, peak in enumerate(maxima):
            # A layer without attention has none.
            if peak > -math.inf:
                put(out, f"layers/{layer}", peak)
        if not out:
            return {}
        return {"attention_logits": {"max": max(maxima), **out}}


class Observed:
    """An attention that is observed, until it is removed."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def remove(self) -> None:
        """Observe no longer."""
        self.attention.observe = None


def largest_logit(q: Tensor, k: Tensor, context: Context) -> Tensor:
    """The largest logit that any query sees, a float32 scalar.

    Shapes  q (B, H, T, D) and k (B, K, T, D) as `attend` gets them, not yet rotated. Memory is that
            of one block of queries: B * H * QUERIES * T numbers.
    """
    # Products of bf16 would round the logits to 8 bits.
    with torch.autocast(q.device.type, enabled=False):
        q = q.float()
        k = k.float()
        if context.rope is not None:
            q = rotate_heads(q, context.rope)
            k = rotate_heads(k, context.rope)
        T = q.shape[2]
        starts = [0]
        if context.share is not None:
            k = context.share.gather(k, 2)
            starts = context.share.starts(T)
        keys_of_group = k[:, :, None].transpose(-1, -2)
        grouped = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
        peak = torch.full((), -math.inf, device=q.device)
        for span in spans(T, starts):
            block = grouped[..., span.start : span.end, :]
            scores = (block @ keys_of_group[..., : span.keys]).flatten(1, 2)
            if context.bias is not None:
                scores = scores + context.bias[:, :, span.start : span.end, : span.keys]
            seen = rows_of(context.mask, span)
            if seen is None:
                # The queries are the last of the keys.
                n = span.end - span.start
                ones = torch.ones(n, span.keys, dtype=torch.bool, device=q.device)
                seen = ones.tril(span.keys - n)
            peak = torch.maximum(peak, scores.masked_fill(~seen, -math.inf).amax())
        return peak
