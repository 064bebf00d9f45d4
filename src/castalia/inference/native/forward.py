"""The forward pass of the native engine on torch's operators: any storage, any machine that torch runs on.

A batch is M rows, each one token with the slot of its sequence and its position there, as in step.cpp.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.inference.native.kernels import Kernel, make
from castalia.inference.native.weights import Weights, rope_angles


@dataclass(frozen=True)
class TorchCache:
    """Keys and values of `slots` sequences, (layers, slots, heads, length, head_dim) each."""

    k: Tensor
    v: Tensor

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """Let the first `tokens` of slot `target` be those of `origin`."""
        for kept in (self.k, self.v):
            kept[:, target, :, :tokens] = kept[:, origin, :, :tokens]


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch stand; `runs` are (slot, first row, rows) of neighbours in one slot."""

    slots: Tensor
    positions: Tensor
    runs: list[tuple[int, int, int]]
    longest: int


class TorchForward:
    """One decoder on the kernels that were chosen for its shapes."""

    def __init__(self, weights: Weights, kernels: dict[tuple[int, int], str]) -> None:
        self.weights, self.config = weights, weights.config
        self.linears: dict[str, Kernel] = {
            name: make(kernels[packed.channels, packed.inputs], packed)
            for name, packed in weights.linears.items()
        }
        self.cos, self.sin = rope_angles(weights.config)

    def new_cache(self, slots: int, length: int) -> TorchCache:
        """An empty cache of `slots` sequences of at most `length` tokens."""
        shape = (
            self.config.num_layers,
            slots,
            self.config.num_attention_heads,
            length,
            self.config.head_dim,
        )
        return TorchCache(torch.empty(shape), torch.empty(shape))

    @torch.inference_mode()
    def run(
        self,
        cache: TorchCache,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        pick: Sequence[int],
    ) -> Tensor:
        """As `FusedForward.run`."""
        rows = rows_of(slots, positions)
        x = self.embed(torch.tensor(tokens))
        for i in range(self.config.num_layers):
            x = self.block(i, x, cache, rows)
        return self.linears["head"](
            self.norm("norm", x[torch.tensor(list(pick), dtype=torch.int64)])
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """(M,) ids -> (M, C) float32."""
        x, scale = self.weights.embed[tokens].float(), self.weights.embed_scale
        return x if scale is None else x * scale[tokens, None]

    def norm(self, place: str, x: Tensor) -> Tensor:
        """One LayerNorm."""
        norms, shape = self.weights.norms, (self.config.hidden_size,)
        return F.layer_norm(
            x,
            shape,
            norms[f"{place}.weight"],
            norms[f"{place}.bias"],
            self.config.layernorm_epsilon,
        )

    def block(self, i: int, x: Tensor, cache: TorchCache, rows: Rows) -> Tensor:
        """One layer, (M, C) -> (M, C)."""
        place = f"layers.{i}"
        qkv = self.linears[f"{place}.attn.qkv"](self.norm(f"{place}.norm1", x))
        attended = self.linears[f"{place}.attn.out"](self.attend(i, qkv, cache, rows))
        if not self.config.parallel_residual:
            x, attended = x + attended, torch.zeros(())
        inner = self.linears[f"{place}.mlp.up"](self.norm(f"{place}.norm2", x))
        inner = F.gelu(
            inner, approximate="tanh" if self.config.activation == "gelu_tanh" else "none"
        )
        return x + (attended + self.linears[f"{place}.mlp.down"](inner))

    def attend(self, i: int, qkv: Tensor, cache: TorchCache, rows: Rows) -> Tensor:
        """Write keys and values, then let every row look back in its slot: (M, 3 C) -> (M, C)."""
        q, k, v = qkv.unflatten(1, (self.config.num_attention_heads, 3, -1)).unbind(2)
        q, k = self.turn(q, rows.positions), self.turn(k, rows.positions)
        keys, values = cache.k[i], cache.v[i]
        keys[rows.slots, :, rows.positions], values[rows.slots, :, rows.positions] = k, v
        if len(rows.runs) == len(q):
            end = rows.longest
            seen = (torch.arange(end) <= rows.positions[:, None])[:, None, None]
            y = F.scaled_dot_product_attention(
                q[:, :, None],
                keys[rows.slots, :, :end],
                values[rows.slots, :, :end],
                attn_mask=seen,
            )
            return y.flatten(1)
        parts = []
        for slot, start, count in rows.runs:
            span = rows.positions[start : start + count]
            end = int(span[-1]) + 1
            seen = torch.arange(end) <= span[:, None]
            y = F.scaled_dot_product_attention(
                q[start : start + count].transpose(0, 1),
                keys[slot, :, :end],
                values[slot, :, :end],
                attn_mask=seen,
            )
            parts.append(y.transpose(0, 1).flatten(1))
        return torch.cat(parts)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of (M, H, D)."""
        if not self.config.rotary_dim:
            return x
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        a, b = x[..., : self.config.rotary_dim].chunk(2, -1)
        return torch.cat(
            (a * cos - b * sin, b * cos + a * sin, x[..., self.config.rotary_dim :]), -1
        )


def rows_of(slots: Sequence[int], positions: Sequence[int]) -> Rows:
    """The rows of a batch, neighbours of one slot together."""
    runs, start = [], 0
    for slot, group in groupby(slots):
        count = len(list(group))
        runs.append((slot, start, count))
        start += count
    return Rows(torch.tensor(slots), torch.tensor(positions), runs, max(positions) + 1)
