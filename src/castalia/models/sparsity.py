"""`SparsityConfig`: the section of sparse attention. Needs no torch."""

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import NonNegativeInt, PositiveInt, model_validator

from castalia.config.base import Config

SparseKind = Literal["local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer"]
SPARSE: frozenset[str] = frozenset(get_args(SparseKind))
"""Kinds of attention whose queries see some blocks of keys, by a pattern of DeepSpeed."""
SAME = frozenset({"local", "bslongformer"})
"""Kinds whose heads are all alike whatever the config says."""


class SparsityConfig(Config):
    """Which blocks of keys a block of queries sees in layers of sparse attention.

    Source  DeepSpeed, deepspeed/ops/sparse_attention/sparsity_config.py; names and defaults as
            GPT-NeoX passes them on.
    """

    block: PositiveInt = 16
    """Tokens in a block."""
    different_layout_per_head: bool = False
    """Each head has a pattern of its own, where the kind has several or draws blocks."""
    num_local_blocks: PositiveInt | None = None
    """sparse_fixed: blocks in a local window. local: twice the blocks that a block looks back. null
    means 4, for local num_sliding_window_blocks."""
    num_global_blocks: PositiveInt = 1
    """sparse_fixed: summary blocks of each window; bigbird: first blocks, which all later ones
    see."""
    num_different_global_patterns: PositiveInt = 1
    """sparse_fixed: places of the summary blocks in a window, which heads take in turn."""
    num_random_blocks: NonNegativeInt | None = None
    """Blocks drawn for each block of queries. null means 0 for sparse_variable, 1 for bigbird."""
    num_sliding_window_blocks: PositiveInt | None = None
    """bigbird, bslongformer, local: twice the blocks that a block looks back, rounded down. null
    means 3, for local 4."""
    local_window_blocks: tuple[PositiveInt, ...] = (4,)
    """sparse_variable: blocks in each local window; the last number repeats."""
    global_block_indices: tuple[NonNegativeInt, ...] = (0,)
    """sparse_variable, bslongformer: blocks that all later ones see."""
    global_block_end_indices: tuple[PositiveInt, ...] | None = None
    """Where given, each of global_block_indices begins a range that ends before this number."""
    seed: int = 1234
    """Seed of the drawn blocks."""

    @property
    def global_ranges(self) -> list[range]:
        """Blocks that all later ones see, of sparse_variable and bslongformer."""
        ends = self.global_block_end_indices
        if ends is None:
            ends = tuple(first + 1 for first in self.global_block_indices)
        return [range(*pair) for pair in zip(self.global_block_indices, ends, strict=True)]

    def window(self, kind: str) -> int:
        """Blocks that a block of queries looks back, of kinds with a sliding window."""
        width = self.num_sliding_window_blocks
        if kind == "local":
            # GPT-NeoX reads either name for it, this one first.
            width = self.num_local_blocks or width or 4
        return (width or 3) // 2

    def most_keys(self, kind: str) -> int | None:
        """Most tokens that a token sees; None where that grows with the row."""
        if kind in ("sparse_fixed", "sparse_variable"):
            return None
        blocks = self.window(kind) + 1
        if kind == "bigbird":
            drawn = 1 if self.num_random_blocks is None else self.num_random_blocks
            blocks += self.num_global_blocks + drawn
        if kind == "bslongformer":
            # A block that sees all is rare enough to leave out.
            blocks += sum(len(seen) for seen in self.global_ranges)
        return blocks * self.block

    @model_validator(mode="after")
    def check(self) -> "SparsityConfig":
        """The conditions of DeepSpeed."""
        for problem in self.problems():
            raise ValueError(problem)
        return self

    def problems(self) -> Iterator[str]:
        """Sizes that exclude each other."""
        starts = self.global_block_indices
        ends = self.global_block_end_indices
        if ends is not None and len(ends) != len(starts):
            yield (
                f"global_block_end_indices has {len(ends)} numbers and global_block_indices"
                f" {len(starts)}; each range needs both"
            )
        if not self.local_window_blocks:
            yield "local_window_blocks is empty; give the blocks of at least one window"
        local = self.num_local_blocks or 4
        if self.num_different_global_patterns == 1:
            return
        if not self.different_layout_per_head:
            yield (
                "num_different_global_patterns above 1 needs different_layout_per_head=true, since"
                " heads take them in turn"
            )
        if self.num_different_global_patterns * self.num_global_blocks > local:
            yield (
                f"num_different_global_patterns {self.num_different_global_patterns} of"
                f" num_global_blocks {self.num_global_blocks} do not fit a window of {local} blocks"
            )
