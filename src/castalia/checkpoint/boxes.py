"""Where a piece of a tensor lies in the whole, which part this process holds, and whether pieces fill a shape."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.distributed.tensor import DTensor

Run = tuple[int, int]
"""Half-open range [start, stop) along one dimension."""


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor: the index where it begins in each dimension, and its size."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for the only box of a 0-dim tensor."""
        return math.prod(self.shape)

    def meet(self, other: "Box") -> "Box":
        """The part common to both; its volume is 0 when there is none."""
        low = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        high = [min(a + size_a, b + size_b) for a, size_a, b, size_b in ends]
        return Box(
            tuple(low), tuple(max(0, stop - start) for start, stop in zip(low, high, strict=True))
        )

    def seen_from(self, offset: Sequence[int]) -> tuple[slice, ...]:
        """Slices of this box in a tensor whose first element stands at `offset` of the whole."""
        places = zip(self.offset, self.shape, offset, strict=True)
        return tuple(slice(begin - origin, begin - origin + size) for begin, size, origin in places)


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def cut(runs: list[Run], start: int, stop: int) -> list[Run]:
    """Elements [start, stop) of the sequence that the runs make when laid end to end."""
    found, before = [], 0
    for low, high in runs:
        a, b = max(start - before, 0), min(stop - before, high - low)
        if a < b:
            found.append((low + a, low + b))
        before += high - low
    return found


def shard(runs: list[Run], index: int, count: int, pieces: int = 1) -> list[Run]:
    """Part `index` of `count`, by torch.chunk's rule; with pieces > 1, that part of each of `pieces` chunks.

    Pieces above 1 are what FSDP makes of a dimension that tensor parallelism has cut already (split_factor).
    """
    total = sum(high - low for low, high in runs)
    outer = -(-total // pieces)
    found: list[Run] = []
    for begin in range(0, total, outer or 1):
        piece = cut(runs, begin, min(begin + outer, total))
        length = sum(high - low for low, high in piece)
        inner = -(-length // count)
        found += cut(piece, min(index * inner, length), min((index + 1) * inner, length))
    return joined(found)


def joined(runs: list[Run]) -> list[Run]:
    """The same runs with neighbours that touch made one."""
    found: list[Run] = []
    for low, high in runs:
        if found and found[-1][1] == low:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return found


def held_boxes(tensor: Tensor) -> list[tuple[Box, Box]]:
    """(box in the whole tensor, box in this process's local tensor) for each contiguous piece that it holds.

    One pair for a plain tensor or an ordinary shard; several where a sharded dimension is interleaved; none if empty.
    """
    if not isinstance(tensor, DTensor):
        return [(whole(tensor.shape), whole(tensor.shape))]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    runs: list[list[Run]] = [[(0, size)] for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), (
            "a tensor of partial sums has no value to save or to load into"
        )
        dim = getattr(placement, "dim", None)
        if dim is not None:
            pieces = getattr(placement, "split_factor", 1)
            runs[dim] = shard(runs[dim], coordinate[axis], tensor.device_mesh.size(axis), pieces)
    return pair_boxes(runs)


def pair_boxes(runs: list[list[Run]]) -> list[tuple[Box, Box]]:
    """Each combination of one run a dimension: its box in the whole, and in the tensor of all runs laid end to end."""
    starts = [
        list(itertools.accumulate((high - low for low, high in dim), initial=0)) for dim in runs
    ]
    pairs = []
    for choice in itertools.product(*(range(len(dim)) for dim in runs)):
        picked = [runs[dim][number] for dim, number in enumerate(choice)]
        shape = tuple(high - low for low, high in picked)
        local = tuple(starts[dim][number] for dim, number in enumerate(choice))
        pairs.append((Box(tuple(low for low, _ in picked), shape), Box(local, shape)))
    return pairs


def is_first_copy(tensor: Tensor, rank: int) -> bool:
    """Whether this process is the one that writes its piece: rank 0 for plain tensors, index 0 of replicated axes."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return not any(
        place and placement.is_replicate()
        for place, placement in zip(coordinate, tensor.placements, strict=True)
    )


def fault_of_tiling(shape: Sequence[int], boxes: list[Box]) -> str | None:
    """Why the boxes do not cover `shape` exactly once; None when they do."""
    if any(len(box.offset) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return "a piece has another number of dimensions"
    if any(
        at + n > size
        for box in boxes
        for at, n, size in zip(box.offset, box.shape, shape, strict=True)
    ):
        return "a piece lies outside"
    have, want = sum(box.volume for box in boxes), math.prod(shape)
    if have != want:
        return f"the pieces hold {have} elements in place of {want}"
    return "pieces overlap" if len(boxes) > 1 and overlap(boxes) else None


def overlap(boxes: list[Box]) -> bool:
    """Whether any two of several boxes, none of them empty, share an element."""
    low = np.array([box.offset for box in boxes])
    high = low + np.array([box.shape for box in boxes])
    varying = np.flatnonzero((low != low[0]).any(axis=0))
    if (
        len(varying) == 1
    ):  # the common case, shards along one dimension: only neighbours can overlap
        order = np.argsort(low[:, varying[0]])
        return bool((high[order[:-1], varying[0]] > low[order[1:], varying[0]]).any())
    for i in range(len(boxes) - 1):
        if np.all(
            np.maximum(low[i], low[i + 1 :]) < np.minimum(high[i], high[i + 1 :]), axis=1
        ).any():
            return True
    return False
