"""Closed forms: how many parameters a decoder has and what one token costs."""

from typing import NamedTuple

from castalia.models.config import ModelConfig


class ParameterCounts(NamedTuple):
    """Number of parameters: all, and without the embedding and the output head."""

    total: int
    non_embedding: int


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that multiply every token: QKV, attention-out, MLP in and out of all layers, and the output head."""
    d, f = config.hidden_size, config.ffn_size
    return config.num_layers * (4 * d * d + 2 * d * f) + config.padded_vocab_size * d


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Exact parameter counts of Decoder(config), without building it.

    For Pythia's shapes total = 2 V d + L (12 d^2 + 13 d) + 2 d.
    """
    d, f, V = config.hidden_size, config.ffn_size, config.padded_vocab_size
    biases = (4 * d if config.attention_bias else 0) + (f + d if config.mlp_bias else 0)
    layer = 4 * d * d + 2 * d * f + biases + 4 * d
    non_embedding = config.num_layers * layer + 2 * d
    embedding = V * d * (1 if config.tie_word_embeddings else 2)
    return ParameterCounts(non_embedding + embedding, non_embedding)


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """FLOPs of one training token: 6 N + 12 L d T, N the weights in matrix products, T = seq_length.

    A multiply-add is 2 FLOPs, the backward costs twice the forward. Attention is counted whole, without the half that
    causal masking could save, and recomputation is not counted: the convention of model FLOPs utilization.
    Source  Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    attention = 12 * config.num_layers * config.hidden_size * seq_length
    return 6 * matmul_parameters(config) + attention
