"""gMLP's layer: a gate that sums over earlier tokens, and aMLP's, which adds attention to it.

Shapes: B batch, T tokens held here, K keys, C width, F channels held here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models.block import Block
from castalia.models.context import Context, HeadShare
from castalia.models.gating import GmlpOptions
from castalia.models.model_config import BlocksConfig
from castalia.models.parts.dropout import MLP_OUT, drop_hidden, project
from castalia.models.parts.masks import segment_mask
from castalia.models.parts.mlp import FUNCTIONS
from castalia.models.parts.norms import HeadNorm, local, make_norm
from castalia.models.state import PositionCache
from castalia.recurrent.held import BareMatrix


class SpatialMatrix(nn.Module):
    """A weight for each pair of positions, and a bias for each position."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, length))
        self.bias = nn.Parameter(torch.empty(length))

    def forward(self, values_BKF: Tensor, seen: Tensor, context: Context) -> Tensor:
        """(B, K, F) -> (B, T, F), sums over the keys that each token sees.

        seen    bool (1 or B, T, K).
        Raises  ValueError if a row is longer than the matrix.
        """
        weight = local(self.weight)
        bias = local(self.bias)
        T, K = seen.shape[1:]
        if context.state is not None:
            # Only padding lies behind the matrix, of which no token makes use; see
            # castalia.models.parts.positions.
            places = context.positions.clamp(max=len(bias) - 1)
            K = min(K, len(bias))
            rows = weight[places, :K]
            own = bias[places]
        elif context.segments is not None:
            # Each document begins at the first row and column.
            places = context.positions.expand(len(seen), T)
            self.require(T if context.positions.shape[0] == 1 else 1)
            rows = weight[places[:, :, None], places[:, None, :]]
            own = bias[places]
        else:
            self.require(T)
            rows = weight[None, :T, :T]
            own = bias[None, :T]
        mixing = rows.masked_fill(~seen[..., :K], 0.0)
        sums: Tensor = mixing @ values_BKF[:, :K]
        return sums + own[..., None]

    def require(self, T: int) -> None:
        """Raises  ValueError for rows longer than the matrix."""
        if len(self.bias) < T:
            raise ValueError(
                f"rows of {T} tokens are longer than the matrix over positions of this model,"
                f" {len(self.bias)} (model.max_position_embeddings); cut them"
            )


class TinyAttention(nn.Module):
    """One head of attention, from both halves of the channels into the gate.

    Every rank of tensor parallelism computes it whole, for its own channels of the gate.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.channels = channels
        self.qkv = BareMatrix(2 * channels, 3 * size, bias=True)
        self.out = BareMatrix(size, channels, bias=True)

    def projected(self, up_BTF: Tensor, gate_BTF: Tensor, share: HeadShare) -> Tensor:
        """Queries, keys and values side by side, (B, T, 3 * size)."""
        weight = local(self.qkv.weight).unflatten(1, (2, self.channels))
        own = weight[:, :, share.of(self.channels)].flatten(1)
        return share.total(F.linear(torch.cat((up_BTF, gate_BTF), -1), own)) + local(self.qkv.bias)

    def forward(self, q_BTD: Tensor, kv: Tensor, seen: Tensor, share: HeadShare) -> Tensor:
        """Queries (B, T, D), keys and values side by side (B, K, 2D) -> (B, T, F)."""
        k, v = kv.to(q_BTD.dtype).chunk(2, -1)
        y_BTD = F.scaled_dot_product_attention(q_BTD, k, v, attn_mask=seen)
        own = share.of(self.channels)
        return F.linear(y_BTD, local(self.out.weight)[own], local(self.out.bias)[own])


class SpatialGating(nn.Module):
    """down(up(x) * gate), the gate a sum over earlier tokens of gate(x), normed.

    Source  Liu et al. 2021, arXiv:2105.08050, equation 6 and figure 1.
    """

    tp_plan = {
        "": "gathered",
        "up": "columns",
        "gate": "columns",
        "norm": "whole",
        "spatial": "whole",
        "attn": "whole",
        "down": "row",
    }

    def __init__(self, config: BlocksConfig, options: GmlpOptions, attends: bool) -> None:
        super().__init__()
        width = config.hidden_size
        channels = options.inner_size or 4 * width
        self.function = FUNCTIONS[options.activation]
        self.up = nn.Linear(width, channels, bias=options.bias)
        self.gate = nn.Linear(width, channels, bias=options.bias)
        # Over all channels, which ranks share: a head of one number for each of them.
        self.norm = HeadNorm(
            channels,
            1,
            across=True,
            by_head=True,
            centred=config.norm != "rmsnorm",
            affine=config.norm != "non_parametric_layernorm",
            eps=config.layernorm_epsilon,
        )
        self.spatial = SpatialMatrix(config.max_position_embeddings)
        self.attn = TinyAttention(channels, options.attention_size) if attends else None
        self.down = nn.Linear(channels, width, bias=options.bias)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        share = context.heads
        up_BTF = self.function(project(self.up, x_BTC, context.draws))
        gate_BTF = self.function(project(self.gate, x_BTC, context.draws))
        values = self.norm(gate_BTF[..., None], share)[..., 0]
        channels = values.shape[-1]
        q = None
        if self.attn is not None:
            qkv = self.attn.projected(up_BTF, gate_BTF, share)
            size = qkv.shape[-1] // 3
            q = qkv[..., :size]
            values = torch.cat((values, qkv[..., size:].to(values.dtype)), -1)
        if context.state is not None:
            assert isinstance(context.state, PositionCache)
            values = context.state.append(values)
        seen = seen_keys(context, up_BTF.shape[1], values.shape[1])
        mixed = self.spatial(values[..., :channels], seen, context)
        if self.attn is not None and q is not None:
            mixed = mixed + self.attn(q, values[..., channels:], seen, share)
        return project(self.down, up_BTF * mixed.to(up_BTF.dtype), context.draws)


def seen_keys(context: Context, T: int, keys: int) -> Tensor:
    """Bool (1 or B, T, keys), True where a token sees another."""
    device = context.positions.device
    if context.state is not None:
        return torch.arange(keys, device=device) <= context.positions[..., None]
    if context.segments is not None:
        return segment_mask(context.segments)[:, 0]
    return torch.ones(1, T, keys, dtype=torch.bool, device=device).tril()


class GmlpBlock(Block):
    """x + gating(norm x)."""

    tp_plan = {"norm": "sequence"}

    def __init__(self, config: BlocksConfig, options: GmlpOptions, attends: bool) -> None:
        super().__init__()
        self.residual = options.residual
        self.norm = make_norm(config)
        self.gating = SpatialGating(config, options, attends)
        self.widest = self.gating.up.out_features
        # What the state keeps of a token: the gate's values, keys and values of the attention.
        self.remembered = self.widest + (2 * options.attention_size if attends else 0)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        y_BTC: Tensor = self.gating(self.norm(x_BTC), context)
        y_BTC = drop_hidden(y_BTC, context.draws, MLP_OUT)
        return x_BTC + y_BTC if self.residual else y_BTC.to(x_BTC.dtype)

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> PositionCache:
        """What each token of `batch` rows of at most `length` leaves for later ones, empty."""
        return PositionCache((batch, length, self.remembered), dtype, device)
