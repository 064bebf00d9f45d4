"""Where the parts of a tensor lie in the whole, and which of them this rank holds.

The one derivation of a DTensor's geometry: start weights, checkpoints and the gradient norm all use
it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

Span = tuple[int, int]
"""Half-open range [start, stop) along one dimension."""


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor: its first index in each dimension, and its size."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for the only box of a 0-dim tensor."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices of this box in the whole tensor."""
        return self.slices_from((0,) * len(self.offset))

    def intersection(self, other: "Box") -> "Box":
        """The box common to both; its volume is 0 where they do not meet."""
        low = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        high = [min(a + size_a, b + size_b) for a, size_a, b, size_b in ends]
        shape = [max(0, stop - start) for start, stop in zip(low, high, strict=True)]
        return Box(tuple(low), tuple(shape))

    def slices_from(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Slices of this box in a tensor whose first element is element `origin` of the whole."""
        dims = zip(self.offset, self.shape, origin, strict=True)
        return tuple(slice(begin - first, begin - first + size) for begin, size, first in dims)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def local_boxes(tensor: Tensor) -> list[tuple[Box, Box]]:
    """Pairs (box in the whole tensor, box in this rank's local tensor), one for each contiguous
    part.

    One pair for a plain tensor or an ordinary shard, several where a sharded dimension is
    interleaved, and none where the local tensor is empty.
    """
    if not isinstance(tensor, DTensor):
        return [(whole(tensor.shape), whole(tensor.shape))]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    spans: list[list[Span]] = [[(0, size)] for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "a tensor of partial sums has no values to copy"
        dim = getattr(placement, "dim", None)
        if dim is not None:
            # FSDP after tensor parallelism shards one dimension twice. Its placement comes first in
            # the mesh but cuts last, so torch marks it with a split_factor: it cuts each of the tp
            # parts by itself.
            pieces = getattr(placement, "split_factor", 1)
            spans[dim] = shard(spans[dim], coordinate[axis], tensor.device_mesh.size(axis), pieces)
    return pair_boxes(spans)


def holds_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is at coordinate 0 of every mesh axis along which `tensor` is replicated.

    Of the ranks that hold the same part exactly one does, so what it writes or counts is written or
    counted once.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return not any(
        place and placement.is_replicate()
        for place, placement in zip(coordinate, tensor.placements, strict=True)
    )


def stands_for_copies(tensor: Tensor, rank: int) -> bool:
    """Whether of the ranks that hold the same part of `tensor` this one saves or sends it.

    A plain tensor is equal on all ranks that hold it, of which rank 0 must be one.
    """
    if isinstance(tensor, DTensor):
        return holds_first_copy(tensor)
    return rank == 0


def shard(spans: list[Span], index: int, count: int, pieces: int = 1) -> list[Span]:
    """Shard `index` of `count` by torch.chunk's rule; with `pieces` > 1, that shard of each of
    `pieces` chunks."""
    total = sum(high - low for low, high in spans)
    outer = -(-total // pieces)
    out: list[Span] = []
    # A dimension of size 0 has no chunks; range() refuses a step of 0.
    for begin in range(0, total, outer or 1):
        chunk = cut(spans, begin, min(begin + outer, total))
        length = sum(high - low for low, high in chunk)
        inner = -(-length // count)
        out += cut(chunk, min(index * inner, length), min((index + 1) * inner, length))
    return joined(out)


def cut(spans: list[Span], start: int, stop: int) -> list[Span]:
    """Elements [start, stop) of the sequence of all spans laid end to end."""
    out = []
    before = 0
    for low, high in spans:
        first = max(start - before, 0)
        last = min(stop - before, high - low)
        if first < last:
            out.append((low + first, low + last))
        before += high - low
    return out


def joined(spans: list[Span]) -> list[Span]:
    """The same spans, adjacent ones merged."""
    out: list[Span] = []
    for low, high in spans:
        if out and out[-1][1] == low:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return out


def pair_boxes(spans: list[list[Span]]) -> list[tuple[Box, Box]]:
    """Each combination of one span a dimension: its box in the whole, and in the local tensor.

    The local tensor holds the spans of each dimension end to end.
    """
    starts = []
    for dim in spans:
        lengths = (high - low for low, high in dim)
        starts.append(list(itertools.accumulate(lengths, initial=0)))
    pairs = []
    for choice in itertools.product(*(range(len(dim)) for dim in spans)):
        picked = [spans[dim][number] for dim, number in enumerate(choice)]
        shape = tuple(high - low for low, high in picked)
        local = tuple(starts[dim][number] for dim, number in enumerate(choice))
        pairs.append((Box(tuple(low for low, _ in picked), shape), Box(local, shape)))
    return pairs
