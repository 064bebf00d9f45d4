"""Sparse attention by blocks: DeepSpeed's patterns, as masks.

A pattern is a bool table (heads or 1, blocks, blocks): whether a block of queries sees a block of
keys. All look back only, as GPT-NeoX asks of them, and inside a block a query sees no later key.

Source  DeepSpeed, deepspeed/ops/sparse_attention/sparsity_config.py (attention="unidirectional");
        sparse_fixed, Child et al. 2019, arXiv:1904.10509; bigbird, Zaheer et al. 2020,
        arXiv:2007.14062; bslongformer, Beltagy et al. 2020, arXiv:2004.05150.
"""

import random
from functools import lru_cache

import torch
from torch import Tensor

from castalia.models.config import TransformerConfig
from castalia.models.context import HeadShare
from castalia.models.sparsity import SAME, SparsityConfig


def sparse_mask(
    kind: str, config: TransformerConfig, share: HeadShare, queries: Tensor, keys: Tensor
) -> Tensor:
    """Earlier tokens in the blocks of the pattern.

    Shapes  queries int64 (1 or B, T) and keys (keys,), places in the row -> bool (1 or B, 1 or
            heads here, T, keys).
    """
    sparsity = config.sparsity_config or SparsityConfig()
    block = sparsity.block
    # One pattern whatever the length of the row, of which rows take the beginning, as DeepSpeed's
    # master layout: a prompt is then seen alike when it has become longer.
    longest = max(len(keys), config.max_position_embeddings)
    layout = block_layout(kind, sparsity, config.num_attention_heads, -(-longest // block))
    if len(layout) > 1:
        layout = layout[share.of(config.num_attention_heads)]
    layout = layout.to(keys.device)
    pairs = layout[:, queries[..., None] // block, keys // block].transpose(0, 1)
    return pairs & (keys <= queries[..., None])[:, None]


@lru_cache(maxsize=16)
def block_layout(kind: str, sparsity: SparsityConfig, heads: int, blocks: int) -> Tensor:
    """The pattern of a kind of attention: bool (heads or 1, blocks, blocks), lower triangular.

    Shapes  the first dim is 1 where all heads have the same pattern; [h, i, j] says whether the
            queries of block i see the keys of block j.
    """
    patterns = heads if sparsity.different_layout_per_head and kind not in SAME else 1
    layout = torch.zeros(patterns, blocks, blocks, dtype=torch.bool)
    make = LAYOUTS[kind]
    for head in range(patterns):
        make(layout[head], kind, sparsity, head)
    return layout.tril()


def fixed(layout: Tensor, kind: str, sparsity: SparsityConfig, head: int) -> None:
    """Windows side by side, and of each its last blocks as a summary for all that follows."""
    blocks = len(layout)
    width = sparsity.num_local_blocks or 4
    for start in range(0, blocks, width):
        layout[start : start + width, start : start + width] = True
    summary = sparsity.num_global_blocks
    # Further heads take the blocks before the last ones.
    first = width - (1 + head % sparsity.num_different_global_patterns) * summary
    whole = blocks - blocks % width
    for start in range(first, whole, width):
        layout[start:, start : start + summary] = True
    if whole < blocks:
        # A last window that is cut short has its summary as near as it can.
        start = max(0, min(whole + first, blocks - summary))
        layout[start:, start : start + summary] = True


def variable(layout: Tensor, kind: str, sparsity: SparsityConfig, head: int) -> None:
    """Windows of different widths, blocks that all see, and drawn ones."""
    blocks = len(layout)
    # Drawn among all blocks: those that lie ahead stay hidden, so early rows get fewer.
    for row in range(blocks):
        layout[row, drawn(sparsity, sparsity.num_random_blocks or 0, head, row, blocks)] = True
    widths = sparsity.local_window_blocks
    start = 0
    number = 0
    while start < blocks:
        end = start + widths[min(number, len(widths) - 1)]
        layout[start:end, start:end] = True
        start = end
        number += 1
    see_everywhere(layout, sparsity)


def bigbird(layout: Tensor, kind: str, sparsity: SparsityConfig, head: int) -> None:
    """A sliding window, the first blocks, and drawn ones."""
    count = sparsity.num_random_blocks
    for row in range(len(layout)):
        layout[row, drawn(sparsity, 1 if count is None else count, head, row, row + 1)] = True
    slide(layout, sparsity.window(kind))
    layout[: sparsity.num_global_blocks] = True
    layout[:, : sparsity.num_global_blocks] = True


def longformer(layout: Tensor, kind: str, sparsity: SparsityConfig, head: int) -> None:
    """A sliding window, and blocks that all see and that see all."""
    slide(layout, sparsity.window(kind))
    see_everywhere(layout, sparsity)
    for every in sparsity.global_ranges:
        layout[every.start : every.stop] = True


def local(layout: Tensor, kind: str, sparsity: SparsityConfig, head: int) -> None:
    """A sliding window alone."""
    slide(layout, sparsity.window(kind))


def slide(layout: Tensor, back: int) -> None:
    """Each block sees itself and `back` blocks before it."""
    for row in range(len(layout)):
        layout[row, max(0, row - back) : row + 1] = True


def see_everywhere(layout: Tensor, sparsity: SparsityConfig) -> None:
    """All later blocks see those of `global_block_indices`."""
    for seen in sparsity.global_ranges:
        layout[:, seen.start : seen.stop] = True


def drawn(sparsity: SparsityConfig, count: int, head: int, row: int, among: int) -> list[int]:
    """`count` different blocks of the first `among`; the same in every process."""
    # DeepSpeed draws from the state of the process, so that its ranks and resumes differ.
    source = random.Random(f"{sparsity.seed}/{head}/{row}")
    # Of this module only `random` is promised to stay as it is.
    return sorted(range(among), key=lambda _: source.random())[:count]


LAYOUTS = {
    "local": local,
    "sparse_fixed": fixed,
    "sparse_variable": variable,
    "bigbird": bigbird,
    "bslongformer": longformer,
}
