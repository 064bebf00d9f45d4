"""Positions other than rotary: vectors added to the embedding, and biases of the scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models.config import TransformerConfig
from castalia.models.context import Context
from castalia.models.parts.masks import row_positions
from castalia.models.parts.norms import local
from castalia.models.state import ModelState


class LearnedPositions(nn.Module):
    """A vector for each position."""

    def __init__(self, rows: int, width: int, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(rows + offset, width))

    def forward(self, positions: Tensor) -> Tensor:
        """(1 or B, T) int64 -> (1 or B, T, C)."""
        table = local(self.weight)
        # Only padding lies behind the table: a full row that idles in a batch, or reads no tokens
        # while another reads many. Rows of tokens are checked where they come from.
        places = (positions + self.offset).clamp(max=len(table) - 1)
        return F.embedding(places, table)


class SinusoidalPositions(nn.Module):
    """All sines, then all cosines, of geometric frequencies.

    Source  Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in GPT-NeoX's order.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        """(1 or B, T) int64 -> (1 or B, T, C) float32."""
        even = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions.device)
        angles = positions.float()[..., None] * (1.0 / 10000.0 ** (even / self.width))
        return torch.cat((angles.sin(), angles.cos()), -1)[..., : self.width]


def make_positions(config: TransformerConfig) -> nn.Module | None:
    """What turns positions into vectors that are added to the embedding; None if nothing does."""
    if config.pos_emb == "learned":
        rows = config.max_position_embeddings
        return LearnedPositions(rows, config.hidden_size, config.learned_offset)
    if config.pos_emb == "sinusoidal":
        return SinusoidalPositions(config.hidden_size)
    return None


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head, float32 (H,): 2^(-8k/H) for a power of two.

    Other numbers of heads take every other slope of the next power for the rest.
    Source  Press et al. 2021, arXiv:2108.12409, section 3, and its code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * (heads - power) + 1, 2)]
    return torch.tensor(slopes + between)


def alibi_bias(config: TransformerConfig, context: Context, past: ModelState | None) -> Tensor:
    """-slope times the distance, (1 or B, heads held here, T, keys) float32."""
    queries, keys = row_positions(context, past)
    own = context.heads.of(config.num_attention_heads)
    slopes = alibi_slopes(config.num_attention_heads)[own].to(queries.device)
    scale = config.head_dim**-0.5 if config.alibi_scaled else 1.0
    if config.alibi_numerics == "bf16":
        # Falcon rounds slope * key; what it lacks to the distance is the same for all keys.
        by_key = slopes.bfloat16()[:, None] * keys.bfloat16()
        spread = by_key.float()[None, :, None] * scale
        return spread.expand(-1, -1, queries.shape[1], -1)
    distance = (queries[..., None] - keys).float()
    return -(slopes * scale)[None, :, None, None] * distance[:, None]


class RelativeBias(nn.Module):
    """T5's learned bias of each head for buckets of distances, shared by all layers.

    Buckets are single distances up to half their number, then grow geometrically to max_distance.
    Source  Raffel et al. 2019, arXiv:1910.10683, section 2.1; the factor sqrt(D) is GPT-NeoX's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.buckets = config.rpe_num_buckets
        self.furthest = config.rpe_max_distance
        self.heads = config.num_attention_heads
        self.scale = config.bias_factor
        self.weight = nn.Parameter(torch.empty(self.buckets, self.heads))

    def forward(self, context: Context, past: ModelState | None) -> Tensor:
        """(1 or B, heads held here, T, keys)."""
        queries, keys = row_positions(context, past)
        bucket = self.bucket((queries[..., None] - keys).clamp(min=0))
        own = local(self.weight)[:, context.heads.of(self.heads)]
        return F.embedding(bucket, own).movedim(-1, 1) * self.scale

    def bucket(self, distance: Tensor) -> Tensor:
        """Number of the bucket of each distance, int64 of the same shape."""
        exact = self.buckets // 2
        growth = (distance.clamp(min=1).float() / exact).log() / math.log(self.furthest / exact)
        far = exact + (growth * (self.buckets - exact)).long()
        return torch.where(distance < exact, distance, far.clamp(max=self.buckets - 1))
