"""The weights of a μP model as those of a model without μP that computes the same.

The factors of μP go into the weights they stand beside, so that every format and every engine has
them, also those whose architecture knows no such factor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from castalia.checkpoint.tensors import StoredTensor, StoredTensors
from castalia.formats.saved_model import SavedModel
from castalia.models import ModelConfig, TransformerConfig

Factor = Callable[[int], Tensor] | float
"""A number, or the factor of each row of a tensor with so many rows."""


@dataclass(frozen=True)
class Multiplied:
    """A stored tensor times a factor, which is applied to what is read."""

    stored: StoredTensor
    factor: Factor

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.stored.dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        values = self.stored[part].float()
        if isinstance(self.factor, float):
            return (values * self.factor).to(self.dtype)
        rows = self.factor(self.shape[0])[part[0]]
        return (values * rows.view(-1, *[1] * (values.dim() - 1))).to(self.dtype)


def folded(source: SavedModel) -> SavedModel:
    """The same model without μP; `source` itself if it has none, or if its factors have no weight
    to go into."""
    config = source.config
    if config.mup is None:
        return source
    factors, output = embedding_factors(config)
    if isinstance(config, TransformerConfig):
        inside = attention_factors(config)
        if inside is None:
            return source
        factors |= inside
    plain = config.model_copy(
        update={"mup": None, "output_multiplier": config.output_multiplier * output}
    )
    tensors: dict[str, StoredTensor] = {}
    for name in source.tensors:
        stored = source.tensors.stored(name)
        factor = factors.get(name.removeprefix(layer_of(name)))
        tensors[name] = stored
        if factor not in (None, 1.0):
            tensors[name] = Multiplied(stored, factor)
    return replace(source, config=plain, tensors=StoredTensors(tensors, source.tensors.lock))


def layer_of(name: str) -> str:
    """`layers.3.` of a name that begins so, else nothing."""
    if not name.startswith("layers."):
        return ""
    return ".".join(name.split(".")[:2]) + "."


def embedding_factors(config: ModelConfig) -> tuple[dict[str, Factor], float]:
    """Factors of embedding and head, and what is left for the logits."""
    assert config.mup is not None
    before = config.embedding_factor / config.embedding_multiplier
    after = config.output_factor / config.output_multiplier
    factors: dict[str, Factor] = {"embed.weight": before, "score.weight": after}
    if not config.tied_head:
        return factors | {"unembed.weight": after}, 1.0
    # One matrix serves both sides, so the norm before the head makes up for the difference.
    rest = after / before
    if getattr(config, "norm", None) == "non_parametric_layernorm":
        return {"embed.weight": before}, rest
    return factors | {"norm.weight": rest, "norm.bias": rest}, 1.0


def attention_factors(config: TransformerConfig) -> dict[str, Factor] | None:
    """Factors of what makes the scores; None if a norm without weights leaves no place for them."""
    factors: dict[str, Factor] = {
        "position_bias.weight": config.bias_factor / sqrt(config.head_dim)
    }
    score = config.score_factor
    if config.qk_norm == "none" and config.fused_qkv:
        rows = query_rows(config.head_dim, score)
        return factors | {"attn.qkv.weight": rows, "attn.qkv.bias": rows}
    if config.qk_norm == "none":
        return factors | {"attn.q.weight": score, "attn.q.bias": score}
    if config.norm == "non_parametric_layernorm":
        if score == 1.0:
            return factors
        return None
    # GPT-NeoX's one norm serves both sides of the product.
    share = score
    if config.qk_norm == "neox":
        share = sqrt(score)
    return factors | {"attn.q_norm.weight": share, "attn.q_norm.bias": share}


def query_rows(head_dim: int, score: float) -> Callable[[int], Tensor]:
    """The factor of each row of a fused projection: of the queries of each head, then 1 for its
    keys and values."""

    def rows(count: int) -> Tensor:
        by_head = torch.ones(count // (3 * head_dim), 3, head_dim)
        by_head[:, 0] = score
        return by_head.flatten()

    return rows
