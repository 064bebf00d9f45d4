"""Tables of positions for the compiled step, made by the model's own code for every position."""

import torch
from torch import Tensor

from castalia.models.parts.positions import RelativeBias, SinusoidalPositions, alibi_slopes
from castalia.native.packing import PANEL
from castalia.native.weights import PackedWeights


def position_table(weights: PackedWeights) -> Tensor | None:
    """What is added to the embedding, (max_position_embeddings, C) float32, or None."""
    config = weights.config
    count = config.max_position_embeddings
    if config.pos_emb == "learned":
        return weights.norms["positions.weight"][config.learned_offset :][:count]
    if config.pos_emb == "sinusoidal":
        return SinusoidalPositions(config.hidden_size)(torch.arange(count))
    return None


def bias_table(weights: PackedWeights) -> Tensor | None:
    """What is added to the scores of each head, float32 (H, max_position_embeddings + 32), or None.

    By distance, the farthest first: a query reads the biases of the keys 0, 1, ... from one place
    on. alibi_numerics=bf16 rounds by the place of the key, so its columns are places of keys.
    """
    config = weights.config
    count = config.max_position_embeddings
    distances = torch.arange(count - 1, -1, -1)
    if config.pos_emb == "rpe":
        with torch.device("meta"):
            buckets = RelativeBias(config)
        table = weights.norms["position_bias.weight"][buckets.bucket(distances)].T * buckets.scale
    elif config.pos_emb == "alibi":
        slopes = alibi_slopes(config.num_attention_heads)[:, None]
        scale = config.head_dim**-0.5 if config.alibi_scaled else 1.0
        if config.alibi_numerics == "bf16":
            table = (slopes.bfloat16() * torch.arange(count).bfloat16()).float() * scale
        else:
            table = -slopes * scale * distances
    else:
        return None
    # The library reads whole registers, past the last key; and of queries that share one reading,
    # the earlier ones up to the last key of the latest.
    return torch.nn.functional.pad(table, (0, 2 * PANEL))
