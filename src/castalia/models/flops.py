"""Parameters and FLOPs of a model: sums over what its family declares. Needs no torch."""

from functools import cache
from typing import NamedTuple

from castalia.models.costs import Costs
from castalia.models.families import family_of
from castalia.models.model_config import ModelConfig


class ParameterCounts(NamedTuple):
    """Number of parameters: all, and without embedding, tables of positions and output head."""

    total: int
    non_embedding: int


@cache
def layer_costs(config: ModelConfig) -> tuple[Costs, ...]:
    """What each layer costs, in order."""
    # Cached, because a search over layouts asks a thousand times.
    family = family_of(config)
    return tuple(family.costs(config, layer) for layer in range(config.num_layers))


def head_outputs(config: ModelConfig) -> int:
    """Numbers that the output head makes of one token: V logits, or one score of the last."""
    return config.padded_vocab_size if config.head == "vocab" else 1


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that multiply every token: those of all layers, and the output head."""
    head = head_outputs(config) * config.hidden_size
    return sum(costs.products for costs in layer_costs(config)) + head


def embedding_parameters(config: ModelConfig) -> int:
    """The embedding, tables of positions, and the output head where it is a matrix of its own."""
    rows = config.padded_vocab_size + (0 if config.tied_head else head_outputs(config))
    return rows * config.hidden_size + family_of(config).position_parameters(config)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Exact parameter counts of Decoder(config), without building it.

    For Pythia's shapes total = 2 V d + L (12 d^2 + 13 d) + 2 d.
    """
    layers = sum(costs.parameters for costs in layer_costs(config))
    non_embedding = layers + family_of(config).norm_parameters(config)
    return ParameterCounts(non_embedding + embedding_parameters(config), non_embedding)


def active_parameters(config: ModelConfig) -> int:
    """Parameters that work on one token; fewer than all where experts are chosen."""
    total = parameter_counts(config).total
    return total - sum(costs.parameters - costs.active for costs in layer_costs(config))


def model_text(config: ModelConfig) -> str:
    """Family and size in words, with the kinds of layers where these are several."""
    facts = config.facts()
    lines = [f"{facts['family']}, {facts['layers']} layers of width {facts['width']}"]
    if "pattern" in facts:
        lines.append(f"in turn {facts['pattern']}")
    if "experts" in facts:
        lines.append(f"experts: {facts['experts']}")
    return "; ".join(lines)


def parameters_text(config: ModelConfig) -> str:
    """The numbers of parameters for people; the active ones only where they are fewer."""
    counts = parameter_counts(config)
    active = active_parameters(config)
    text = f"{counts.total:,} ({counts.non_embedding:,} non-embedding"
    if active < counts.total:
        text += f", {active:,} active"
    return f"{text})"


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """FLOPs of one training token, forward and backward: 6 N + 12 L d T for a transformer.

    N is the number of weights in matrix products and T the seq_length. By the convention of model
    FLOPs utilization, attention counts in full, although causal masking could save half of it, and
    recomputation does not count.
    Source  Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    layers = sum(costs.flops(seq_length) for costs in layer_costs(config))
    return layers + 6 * head_outputs(config) * config.hidden_size
