"""Queries, keys and values as one matrix, in the orders in which architectures store them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.checkpoint.keymap import Join


def by_key_head(heads: int, kv_heads: int) -> Join:
    """Of each key head in turn: its query heads, the key, the value (Falcon, GPT-NeoX)."""
    group = heads // kv_heads

    def out(ours: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (kv_heads, -1)) for tensor in ours], 1).flatten(0, 1)

    def back(theirs: Tensor) -> Sequence[Tensor]:
        by_head: Tensor = theirs.unflatten(0, (kv_heads, -1))
        width = by_head.shape[1] // (group + 2)
        parts = by_head.split([group * width, width, width], 1)
        return [part.flatten(0, 1) for part in parts]

    return Join(out, back)


def one_after_the_other() -> Join:
    """All queries, all keys, all values, as many of each (GPT-2)."""

    def back(theirs: Tensor) -> Sequence[Tensor]:
        return theirs.chunk(3)

    return Join(lambda ours: torch.cat(list(ours)), back)
