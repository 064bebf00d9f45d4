"""Documents of a row told apart by FlexAttention on a GPU, without a mask of T × T.

The kernel gets a list of the blocks of keys that each block of queries sees. It skips the others,
and looks at documents only in blocks where a border, the diagonal or a window's edge hides a part.
Shapes: B rows, T tokens, N = T / BLOCK blocks, H query heads, K key heads, D width of a head.
Source  Dong et al. 2024, arXiv:2412.05496.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from castalia.models.config import TransformerConfig
from castalia.models.parts.rotary import Rope, rotate_heads

BLOCK = 128
"""Tokens of a block; the kernels' tiles divide it."""
SHAPES = 64
"""Shapes for which a process compiles the kernel: torch gives up after 8, and full micro-batches,
the last one of a step or a validation, ramps of the batch and windows have one each."""


def block_masks(config: TransformerConfig, segments: Tensor) -> dict[str, BlockMask]:
    """The mask of each kind of layer, global and sliding; segments (B, T) int64."""
    windows = {"global": None, "sliding": config.sliding_window}
    return {kind: block_mask(segments, windows[kind]) for kind in config.layer_kinds}


def block_mask(segments: Tensor, window: int | None = None) -> BlockMask:
    """Earlier tokens of the same document, of the last `window` ones; segments (B, T) int64."""
    # torch's create_block_mask would evaluate `sees` at all T × T places first.
    T = segments.shape[1]
    count = -(-T // BLOCK)
    # A ragged end belongs to another document, so that its block is never one that is seen whole.
    behind = (segments[:, -1:] + 1).expand(-1, count * BLOCK - T)
    blocks = torch.cat([segments, behind], 1).unflatten(1, (count, BLOCK))
    first = blocks.amin(-1)
    last = blocks.amax(-1)
    places = torch.arange(count, device=segments.device)
    distance = places[:, None] - places
    # Ranges of numbers that overlap: where numbers never fall, exactly the blocks that share a
    # document, otherwise some more, whose pairs `sees` hides.
    meets = (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])
    meets = meets & (distance >= 0)
    single = first == last
    whole = meets & single[:, :, None] & single[:, None] & (distance > 0)
    if window is not None:
        # The nearest pair of two blocks, and the farthest.
        meets = meets & ((distance - 1) * BLOCK + 1 < window)
        whole = whole & ((distance + 1) * BLOCK - 1 < window)
    whole = whole & meets
    partly = meets & ~whole
    # The forward pass goes by queries, the backward pass by keys, too.
    return BlockMask(
        (T, T),
        *listed(partly),
        *listed(whole),
        *listed(partly.mT),
        *listed(whole.mT),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees(segments, window),
    )


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block has, and all of them, its own first and in their order.

    Shapes  bool (B, N, N) -> int32 (B, 1, N) and (B, 1, N, N).
    """
    numbers = chosen[:, None].int()
    order = numbers.argsort(dim=-1, descending=True, stable=True)
    return numbers.sum(-1).int(), order.int()


def sees(segments: Tensor, window: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key: what the kernel asks of each pair in the blocks of a border."""

    def near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (segments[row, query] == segments[row, key]) & (key <= query)

    if window is None:
        return near
    width = window

    def in_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return near(row, head, query, key) & (query - key < width)

    return in_window


@cache
def kernel() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for each shape."""
    # Whole, or an error: uncompiled it would write out all scores, without a word.
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def compute(*heads: Tensor, **options: Any) -> Tensor:
        # The argument recompile_limit of torch.compile is younger than torch 2.11.
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            y: Tensor = compiled(*heads, **options)
        return y

    return compute


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, rope: Rope | None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D), not yet rotated -> (B, T, H * D)."""
    if rope is not None:
        q = rotate_heads(q, rope)
        k = rotate_heads(k, rope)
    # A compiled block takes the function itself into its graph.
    compute: Any = flex_attention if torch.compiler.is_compiling() else kernel()
    # All in the dtype of the projections: norms and rotations under autocast leave fp32 behind.
    q = q.to(v.dtype)
    k = k.to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        y_BHTD: Tensor = compute(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return y_BHTD.transpose(1, 2).flatten(2)
