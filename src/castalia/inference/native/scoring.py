"""Log-probabilities of whole texts in bfloat16: scoring is bound by arithmetic, where decoding is bound by memory.

Matrix products and attention are in bfloat16, the residual stream and the softmax over the vocabulary in float32. The
logits of 128 positions exist at a time.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.inference.native.packing import dense
from castalia.inference.native.weights import LINEARS, Weights
from castalia.models.parts.attention import by_blocks, split_fused
from castalia.models.parts.rotary import rope_tables

HEAD_ROWS = 128
"""Positions whose logits exist at a time."""


class Scorer:
    """A decoder's weights in bfloat16, made out of any storage when the first text is scored."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config = weights, weights.config
        self.linears = {
            name: dense(packed, torch.bfloat16) for name, packed in weights.linears.items()
        }

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probability of each token but the first: T ids -> (T - 1,) float32, in nats."""
        tokens = torch.tensor(ids)
        hidden = self.hidden(tokens)[:-1]
        head = self.linears["head"]
        # The same memory for every part: what the allocator makes of many large ones that come and go is unforeseeable.
        rounded = torch.empty(HEAD_ROWS, len(head), dtype=torch.bfloat16)
        logits, logprobs = torch.empty(2, HEAD_ROWS, len(head)).unbind()
        parts = []
        for rows, labels in zip(hidden.split(HEAD_ROWS), tokens[1:].split(HEAD_ROWS), strict=True):
            n = len(rows)
            torch.mm(rows, head.T, out=rounded[:n])
            logits[:n] = rounded[:n]
            torch.log_softmax(
                logits[:n], 1, out=logprobs[:n]
            )  # torch's logsumexp takes eight times as long
            parts.append(logprobs[:n].gather(1, labels[:, None])[:, 0])
        return torch.cat(parts) if parts else torch.empty(0)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(T,) ids -> (T, C) bfloat16, normed."""
        embed, scale = self.weights.embed[tokens].float(), self.weights.embed_scale
        x = embed if scale is None else embed * scale[tokens, None]
        rope = (
            rope_tables(self.config, torch.arange(len(tokens))[None])
            if self.config.rotary_dim
            else (None, None)
        )
        for i in range(self.config.num_layers):
            x = self.block(i, x, rope)
        return self.norm("norm", x)

    def norm(self, place: str, x: Tensor) -> Tensor:
        """One LayerNorm in float32, rounded to bfloat16."""
        norms, shape = self.weights.norms, (self.config.hidden_size,)
        y = F.layer_norm(
            x,
            shape,
            norms[f"{place}.weight"],
            norms[f"{place}.bias"],
            self.config.layernorm_epsilon,
        )
        return y.bfloat16()

    def linear(self, place: str, x: Tensor) -> Tensor:
        """One linear layer."""
        packed = self.weights.linears[place]
        bias = None if packed.bias is None else packed.bias[: packed.channels].bfloat16()
        return F.linear(x, self.linears[place], bias)

    def block(self, i: int, x: Tensor, rope: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """One layer."""
        qkv, out, up, down = (f"layers.{i}.{name}" for name in LINEARS)
        fused = self.linear(qkv, self.norm(f"layers.{i}.norm1", x))[None]
        y = by_blocks(*split_fused(fused, self.config.head_dim), *rope, None, [0])
        attended = self.linear(out, y[0])
        if not self.config.parallel_residual:
            x = x + attended
        inner = self.linear(up, self.norm(f"layers.{i}.norm2", x))
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        x = x + self.linear(down, F.gelu(inner, approximate=approximate))
        return x + attended if self.config.parallel_residual else x
