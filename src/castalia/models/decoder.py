"""The decoder of GPT-NeoX and Pythia in plain PyTorch.

Shapes: B batch, T time, C width, H heads, D width of a head, V padded vocabulary.

Source  Black et al. 2022, arXiv:2204.06745 (GPT-NeoX-20B); Biderman et al. 2023, arXiv:2304.01373 (Pythia).
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models.config import ModelConfig
from castalia.models.context import Context, HeadShare, RowShare
from castalia.models.cross_entropy import VocabPart
from castalia.models.flops import flops_per_token
from castalia.models.init import init_parameter
from castalia.models.parts.attention import Attention
from castalia.models.parts.rotary import Rope, rope_tables
from castalia.models.recompute import recomputed
from castalia.models.stages import Part, split
from castalia.models.state import LayerState, ModelState
from castalia.models.tiles import Kind, kind_of

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
"""Twice the constant of the tanh form, GPT-NeoX's 0.79788456."""


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
        self.attn = Attention(config.hidden_size, config.num_attention_heads, config.attention_bias)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.recompute and context.state is None and torch.is_grad_enabled():
            return recomputed(
                self.recompute, self.mlp.up.out_features, self.compute, x_BTC, context
            )
        return self.compute(x_BTC, context)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The layer itself."""
        attn_BTC = self.attn(self.norm1(x_BTC), context)
        if self.parallel_residual:
            return x_BTC + (attn_BTC + self.mlp(self.norm2(x_BTC)))
        x_BTC = x_BTC + attn_BTC
        return x_BTC + self.mlp(self.norm2(x_BTC))

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> LayerState:
        """What this layer remembers of `batch` rows of at most `length` tokens, empty."""
        return self.attn.new_state(batch, length, dtype, device)


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
        self.row_share: RowShare | None = None
        self.head_share = (0, 1)
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
        state: ModelState | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Shapes  tokens (B, T) int64, in a later stage the hidden states (B, T, C) of the one before;
                positions (B, T) int64, the place of each token, default 0..T-1 or, with a state,
                after what the row has; segments (B, T) int64: a token sees only earlier tokens of
                its own segment -> (B, T, C).
        With a state the tokens are appended to it; see castalia.models.state for rows of different
        lengths. Under context parallelism T, positions and segments are those of this rank's tokens.
        Raises  ValueError if the state is too small, or given together with segments or shared rows.
        """
        T = tokens.shape[1]
        if state is not None:
            self.require_usable(state, segments, T)
        context = self.context(tokens, positions, segments, state)
        x_BTC = self.embed(tokens) if self.part.first else tokens
        for i, block in enumerate(self.layers):
            if state is not None:
                context = context._replace(state=state.layers[i])
            x_BTC = block(x_BTC, context)
        if state is not None:
            state.advance(T)
        return self.norm(x_BTC) if self.part.last else x_BTC

    def require_usable(self, state: ModelState, segments: Tensor | None, T: int) -> None:
        """Raises  ValueError if the state cannot take T more tokens of such rows."""
        if segments is not None:
            raise ValueError("segments pack documents for training; a state reads one row each")
        if self.row_share is not None:
            raise ValueError(
                "a state holds whole rows; load the model without context parallelism to generate"
            )
        state.require_room(T)

    def context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        state: ModelState | None,
    ) -> Context:
        """What all blocks share in this pass; see `forward` for the arguments."""
        T = tokens.shape[1]
        mask = None
        if state is not None:
            mask = state.mask(T)
            positions = state.positions(T) if positions is None else positions
        elif segments is not None:
            mask = segment_mask(segments, self.row_share)
        if positions is None:
            positions = places(T, self.row_share).to(tokens.device)
        return Context(
            positions=positions,
            segments=segments,
            rope=self.rope(positions),
            mask=mask,
            share=self.row_share,
            heads=HeadShare(*self.head_share),
        )

    def new_state(
        self,
        batch: int,
        length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelState:
        """An empty state for `batch` rows of at most `length` tokens; dtype and device default to the weights'."""
        dtype = dtype or self.head_weight.dtype
        device = device or self.head_weight.device
        blocks = cast(Iterable[Block], self.layers)
        layers = [block.new_state(batch, length, dtype, device) for block in blocks]
        return ModelState(layers, batch, length, device)

    @property
    def recompute(self) -> bool | str | int:
        """False, True or "full", "selective", or n for every n-th block."""
        return self._recompute

    @recompute.setter
    def recompute(self, how: bool | str | int) -> None:
        self._recompute = how
        for name, block in self.layers.named_children():
            block.recompute = kind_of(how, int(name))  # type: ignore[assignment]

    def rope(self, positions: Tensor) -> Rope | None:
        """Rotary tables of this pass, shared by all blocks; None when nothing turns."""
        if not self.config.rotary_dim:
            return None
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


def places(T: int, part: RowShare | None) -> Tensor:
    """Place in its row of each of the T tokens held here, int64 (1, T)."""
    return torch.arange(T)[None] if part is None else part.positions(T)


def segment_mask(segments: Tensor, part: RowShare | None = None) -> Tensor:
    """Block-diagonal causal mask: (B, T) int64 -> bool (B, 1, T, keys), True where a query may see a key."""
    keys = segments if part is None else part.gather(segments, 1)
    same = segments[:, :, None] == keys[:, None, :]
    if part is None:
        return same.tril()[:, None]
    queries = part.positions(segments.shape[1]).to(segments.device)
    earlier = torch.arange(keys.shape[1], device=segments.device)[None, None] <= queries[..., None]
    return (same & earlier)[:, None]
