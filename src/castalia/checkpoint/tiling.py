"""Whether stored pieces cover a tensor exactly once."""

import math
from collections.abc import Sequence

import numpy as np

from castalia.distributed.boxes import Box


def fault_of_tiling(shape: Sequence[int], boxes: list[Box]) -> str | None:
    """Why the boxes do not cover `shape` exactly once; None when they do."""
    if any(len(box.offset) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return "a piece has another number of dimensions"
    for box in boxes:
        ends = zip(box.offset, box.shape, shape, strict=True)
        if any(offset + length > size for offset, length, size in ends):
            return "a piece lies outside"
    stored = sum(box.volume for box in boxes)
    expected = math.prod(shape)
    if stored != expected:
        return f"the pieces hold {stored} elements, expected {expected}"
    if len(boxes) > 1 and overlap(boxes):
        # The volumes add up, so an overlap is also a gap.
        return "pieces overlap"
    return None


def overlap(boxes: list[Box]) -> bool:
    """Whether any two of several non-empty boxes share an element."""
    low = np.array([box.offset for box in boxes])
    high = low + np.array([box.shape for box in boxes])
    varying = np.flatnonzero((low != low[0]).any(axis=0))
    if len(varying) == 1:
        # Shards along one dimension, the common case: sorted, only neighbours can overlap.
        order = np.argsort(low[:, varying[0]])
        return bool((high[order[:-1], varying[0]] > low[order[1:], varying[0]]).any())
    for i in range(len(boxes) - 1):
        first = np.maximum(low[i], low[i + 1 :])
        last = np.minimum(high[i], high[i + 1 :])
        if np.all(first < last, axis=1).any():
            return True
    return False
