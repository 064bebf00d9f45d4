"""The decoder of GPT-NeoX and Pythia in plain PyTorch.

Shapes: B batch, T time, C width, H heads, D width of a head, V padded vocabulary.

Source  Black et al. 2022, arXiv:2204.06745 (GPT-NeoX-20B); Biderman et al. 2023, arXiv:2304.01373 (Pythia).
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models.attention import (
    SequencePart,
    attention_of_pieces,
    causal_attention,
    pieces_by_kernel,
)
from castalia.models.cache import KVCache, LayerCache
from castalia.models.config import ModelConfig
from castalia.models.cross_entropy import VocabPart
from castalia.models.flops import flops_per_token
from castalia.models.init import init_parameter
from castalia.models.recompute import recomputed
from castalia.models.rotary import Rope, rope_tables, split_qkv
from castalia.models.stages import Part, split
from castalia.models.tiles import KEEP, Kind, kind_of

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
"""Twice the constant of the tanh form, GPT-NeoX's 0.79788456."""


class Attention(nn.Module):
    """Causal self-attention with one fused QKV projection; its row (3 * head + c) * D + d is c of q, k, v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.sequence_part: SequencePart | None = None
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        x_BTC: Tensor,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). `mask` is bool (1 or B, 1, T, keys), True where a query may look; None is causal."""
        qkv = self.qkv(x_BTC)
        if self.sequence_part is not None:
            return self.out(self.see_all(qkv, rope, mask, self.sequence_part))
        if cache is None and qkv.device.type == "cpu":
            keep = torch.is_grad_enabled() and qkv.shape[1] <= KEEP * self.head_dim
            y_BTC, _, _ = causal_attention(qkv, *(rope or (None, None)), mask, self.head_dim, keep)
            return self.out(y_BTC)
        q, k, v = split_qkv(qkv, self.head_dim, rope)
        causal = mask is None
        if cache is not None:
            k, v = cache.append(k, v)
            if (
                q.shape[2] == 1
            ):  # it follows the cached keys and sees them all; is_causal would show it the first only
                causal = False
        y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))

    def see_all(
        self, qkv: Tensor, rope: Rope | None, mask: Tensor | None, part: SequencePart
    ) -> Tensor:
        """Attention of the tokens held here, (B, T, 3 * C) -> (B, T, C), over the keys and values of whole rows."""
        q, k, v = split_qkv(qkv, self.head_dim, rope)
        k, v = part.gather(torch.stack([k, v]), 3).unbind()
        starts = part.starts(q.shape[2])
        if q.device.type == "cpu":
            keep = torch.is_grad_enabled() and k.shape[2] <= KEEP * self.head_dim
            y_BHTD, _ = attention_of_pieces(q, k, v, mask, starts, keep)
        else:
            y_BHTD = pieces_by_kernel(q, k, v, mask, starts)
        return y_BHTD.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(self.activate(self.up(x_BTC)))

    def activate(self, x: Tensor) -> Tensor:
        """GELU. Compiled, the tanh form is written with a sigmoid, 1 + tanh(u) = 2 sigmoid(2u): a third of the time."""
        if self.approximate == "tanh" and torch.compiler.is_compiling():
            y = x.float()
            return (y * torch.sigmoid(GELU_SCALE * y * (1 + 0.044715 * y * y))).to(x.dtype)
        return F.gelu(x, approximate=self.approximate)


class Block(nn.Module):
    """One layer. Parallel: x + attn(norm1 x) + mlp(norm2 x). Serial: x + attn(norm1 x), then x + mlp(norm2 x)."""

    tp_plan = {
        "norm1": "sequence",
        "attn.qkv": "column",
        "attn.out": "row",
        "norm2": "sequence",
        "mlp.up": "column",
        "mlp.down": "row",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.recompute: Kind = ""
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the other arguments go to the attention."""
        if self.recompute and cache is None and torch.is_grad_enabled():
            return recomputed(
                self.recompute, self.mlp.up.out_features, self.compute, x_BTC, rope, mask
            )
        return self.compute(x_BTC, rope, mask, cache)

    def compute(
        self, x_BTC: Tensor, rope: Rope | None, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """The layer itself."""
        attn_BTC = self.attn(self.norm1(x_BTC), rope, mask, cache)
        if self.parallel_residual:
            return x_BTC + (attn_BTC + self.mlp(self.norm2(x_BTC)))
        x_BTC = x_BTC + attn_BTC
        return x_BTC + self.mlp(self.norm2(x_BTC))


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits.

    `recompute` says what the blocks store in training and what they compute again; see castalia.models.recompute.
    Parameters have no meaning until `init_weights` or a checkpoint fills them; the module has no buffers, so building
    on the meta device followed by `to_empty` loses nothing.

    `part`, one of `castalia.models.stages.split`, makes it a stage of a pipeline: it holds that part alone, under the
    names that the whole model has, and hidden states come in where there is no embedding and go out where there is no
    norm. With tied embeddings the last stage has a copy of the embedding for its head.
    """

    tp_plan = {"embed": "vocab", "norm": "gather", "unembed": "head"}

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.part = part or split(config.num_layers, 1)[0]
        self.vocab_part: VocabPart | None = None
        self.sequence_part: SequencePart | None = None
        if self.part.first or (self.part.last and config.tie_word_embeddings):
            self.embed = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for place in self.part.layers:
            self.layers.add_module(str(place), Block(config))  # its name in the whole model
        self.recompute = False
        if self.part.last:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if self.part.last and not config.tie_word_embeddings:
            self.unembed = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    @property
    def tied(self) -> tuple[str, ...]:
        """Names of the parameters here that the first and the last stage of a pipeline both hold."""
        return (
            ("embed.weight",)
            if self.config.tie_word_embeddings and self.part.first != self.part.last
            else ()
        )

    @property
    def copies(self) -> tuple[str, ...]:
        """Those of `tied` that belong to another stage."""
        return () if self.part.first else self.tied

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Shapes  tokens (B, T) int64, in a later stage the hidden states (B, T, C) of the one before; positions (B, T)
                int64, the place of each token for the rotary embedding, default 0..T-1 or, with a cache, after what
                the row has; segments (B, T) int64: a token sees only earlier tokens of its own segment -> (B, T, C).
        With a cache the tokens are appended to it; see castalia.models.cache for rows of different lengths.
        Where processes share each row, T, positions and segments are those of the tokens held here.
        Raises  ValueError if the cache is too small, or given together with segments or with shared rows.
        """
        T = tokens.shape[1]
        mask = None
        if cache is not None:
            if segments is not None:
                raise ValueError(
                    "segments pack documents for training and cannot be used with a KV cache"
                )
            if self.sequence_part is not None:
                raise ValueError(
                    "a KV cache holds whole rows; load the model without context parallelism to generate"
                )
            cache.require_room(T)
            mask = cache.mask(T)
            positions = cache.positions(T) if positions is None else positions
        elif segments is not None:
            mask = segment_mask(segments, self.sequence_part)
        rope = self.rope(tokens, positions)
        x_BTC = self.embed(tokens) if self.part.first else tokens
        for i, block in enumerate(self.layers):
            x_BTC = block(x_BTC, rope, mask, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.advance(T)
        return self.norm(x_BTC) if self.part.last else x_BTC

    @property
    def recompute(self) -> bool | str | int:
        """False, True or "full", "selective", or n for every n-th block."""
        return self._recompute

    @recompute.setter
    def recompute(self, how: bool | str | int) -> None:
        self._recompute = how
        for name, block in self.layers.named_children():
            block.recompute = kind_of(how, int(name))  # type: ignore[assignment]

    def rope(self, tokens: Tensor, positions: Tensor | None) -> Rope | None:
        """Rotary tables of this pass, shared by all blocks; None when nothing turns."""
        if not self.config.rotary_dim:
            return None
        if positions is None:
            positions = places(tokens.shape[1], self.sequence_part).to(tokens.device)
        return rope_tables(self.config, positions)

    def head(self, hidden_BTC: Tensor) -> Tensor:
        """Logits (B, T, V) over the padded vocabulary; the columns from vocab_size on belong to no token."""
        return F.linear(hidden_BTC, self.head_weight)

    @property
    def head_weight(self) -> nn.Parameter:
        """The output matrix (V, C): unembed.weight, or embed.weight when they are tied."""
        weight = self.embed.weight if self.config.tie_word_embeddings else self.unembed.weight
        return cast(nn.Parameter, weight)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all parameters; each depends on (seed, its name) alone, not on device, order or layout of processes."""
        for name, parameter in self.named_parameters():
            parameter.copy_(init_parameter(name, parameter.shape, self.config, seed))

    def flops_per_token(self, T: int) -> int:
        """FLOPs of one training token, forward and backward, in rows of T tokens."""
        return flops_per_token(self.config, T)


def places(T: int, part: SequencePart | None) -> Tensor:
    """Place in its row of each of the T tokens held here, int64 (1, T)."""
    return torch.arange(T)[None] if part is None else part.positions(T)


def segment_mask(segments: Tensor, part: SequencePart | None = None) -> Tensor:
    """Block-diagonal causal mask: (B, T) int64 -> bool (B, 1, T, keys), True where a query may see a key."""
    keys = segments if part is None else part.gather(segments, 1)
    same = segments[:, :, None] == keys[:, None, :]
    if part is None:
        return same.tril()[:, None]
    queries = part.positions(segments.shape[1]).to(segments.device)
    earlier = torch.arange(keys.shape[1], device=segments.device)[None, None] <= queries[..., None]
    return (same & earlier)[:, None]
