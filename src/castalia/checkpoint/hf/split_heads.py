"""GPT-NeoX's one matrix of queries, keys and values under the names of families that have three."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.checkpoint.tensors import StoredTensor, StoredTensors
from castalia.models.config import TransformerConfig
from castalia.models.model_config import ModelConfig
from castalia.models.parts.qkv import heads_apart

FUSED = ".attn.qkv."
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Third:
    """The queries, keys or values of a stored matrix, read when it is indexed."""

    whole: StoredTensor
    heads: int
    part: int
    """0, 1 or 2 of q, k, v."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""
        rows, *rest = self.whole.shape
        return rows // 3, *rest

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.whole.dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        # The rows of one third lie apart in the whole, so all of it is read.
        everything = tuple(slice(0, size) for size in self.whole.shape)
        return third(self.whole[everything], self.heads, self.part)[part]


def third(fused: Tensor, heads: int, part: int) -> Tensor:
    """Queries, keys or values of a fused weight or bias."""
    return heads_apart(fused, heads).chunk(3)[part]


def with_heads_apart(
    tensors: Mapping[str, Tensor], config: ModelConfig, adopted: ModelConfig
) -> Mapping[str, Tensor]:
    """The tensors of `config` under the names of `adopted`, the same model of another family."""
    if not isinstance(config, TransformerConfig) or not isinstance(adopted, TransformerConfig):
        return tensors
    if config.fused_qkv == adopted.fused_qkv:
        return tensors
    heads = config.num_attention_heads
    if not isinstance(tensors, StoredTensors):
        return {
            own: third(tensors[name], heads, part) if FUSED in name else tensors[name]
            for name in tensors
            for part, own in enumerate(names_apart(name))
        }
    stored: dict[str, StoredTensor] = {}
    for name in tensors:
        whole = tensors.stored(name)
        for part, own in enumerate(names_apart(name)):
            stored[own] = Third(whole, heads, part) if FUSED in name else whole
    return StoredTensors(stored, tensors.lock)


def names_apart(name: str) -> list[str]:
    """The names of q, k and v for that of a fused parameter; any other name alone."""
    if FUSED not in name:
        return [name]
    return [name.replace(FUSED, f".attn.{part}.") for part in PARTS]
