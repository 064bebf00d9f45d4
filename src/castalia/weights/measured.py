"""One pass over the tensors of a checkpoint: hash, norm, NaN and a sketch of each.

A sketch is a random projection to 61 numbers. The distance between two tensors is estimated from
their sketches alone, so every checkpoint is read once and all pairs are compared. The estimate has
a standard error of sqrt(2 / 61) / 2, 9% of the distance, where one tensor makes all of it, and less
where several do: 9% / sqrt(k) for k of equal share. Of many pairs the worst are off by three or
four times that. Equality is never judged by it, but by hashes.
Source  Charikar, Chen and Farach-Colton 2002 (count sketch); Thorup and Zhang 2012.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castalia.checkpoint.shards import raw_bytes
from castalia.weights.series import Stored

BUCKETS = 61
"""Numbers of a sketch. A prime: with 64, the columns of a matrix, whose width is a multiple of 64,
would each fall into one bucket, and a few large columns would spoil the estimate."""
ROWS = 1 << 14
"""Rows of BUCKETS elements that are projected at a time: 8 MB of float64."""

Sketch = NDArray[np.float64]


class Measured(NamedTuple):
    """One tensor, read once."""

    digest: str
    """SHA-256 of dtype, shape and elements."""
    shape: tuple[int, ...]
    dtype: str
    file: str
    """The file that holds it."""
    bytes: int
    broken: int
    """Elements that are NaN or infinite."""
    sketch: Sketch | None
    """(61,) float64; None for a tensor of integers."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of floats, which no rounding leaves unchanged by an update."""
        return self.sketch is not None and sum(size > 1 for size in self.shape) > 1


Checkpoint = Mapping[str, Measured]
"""The tensors of one revision by name."""


def measure(tensors: Mapping[str, Stored]) -> dict[str, Measured]:
    """Read each tensor once; one is in memory at a time.

    Raises  CheckpointError if a file is not whole.
    """
    out: dict[str, Measured] = {}
    for name, stored in tensors.items():
        file, tensor = stored.whole()
        out[name] = measured(file, tensor)
    return out


def measured(file: str, tensor: Tensor) -> Measured:
    """One tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    broken = 0
    sketch = None
    if tensor.is_floating_point():
        sketch, broken = projected(tensor)
    return Measured(
        digest_of(tensor), tuple(tensor.shape), dtype, file, tensor.nbytes, broken, sketch
    )


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and elements, hex."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{dtype} {list(tensor.shape)}\0".encode())
    digest.update(raw_bytes(tensor.contiguous()))
    return digest.hexdigest()


def projected(tensor: Tensor) -> tuple[Sketch, int]:
    """The sketch (61,) of a tensor, and how many of its elements are NaN or infinite.

    Element i goes into bucket i mod 61 with a random sign. The signs of a block of rows are those
    of the first, times one more sign for each bucket, so that blocks are independent too.
    """
    flat = tensor.reshape(-1)
    total = torch.zeros(BUCKETS, dtype=torch.float64)
    broken = 0
    for number, start in enumerate(range(0, flat.numel(), ROWS * BUCKETS)):
        block = flat[start : start + ROWS * BUCKETS].double()
        wrong = int((~torch.isfinite(block)).sum())
        if wrong:
            broken += wrong
            block = torch.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
        short = -block.numel() % BUCKETS
        if short:
            block = torch.cat([block, block.new_zeros(short)])
        rows = block.view(-1, BUCKETS)
        signs = signs_of(0, ROWS)[: len(rows)]
        total += torch.einsum("rb,rb->b", rows, signs) * signs_of(number + 1, 1)[0]
    return total.numpy(), broken


@cache
def signs_of(seed: int, rows: int) -> Tensor:
    """Random signs (rows, 61) float64, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, BUCKETS), generator=generator).double().mul_(2).sub_(1)


def stacked(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Sketch:
    """(N, K) the sketches of some tensors of N checkpoints, side by side.

    A tensor that a checkpoint lacks, or has in another shape, counts as 0.
    """
    rows = np.zeros((len(checkpoints), len(names), BUCKETS))
    for number, checkpoint in enumerate(checkpoints):
        for place, name in enumerate(names):
            tensor = checkpoint.get(name)
            if tensor is not None and tensor.sketch is not None:
                rows[number, place] = tensor.sketch
    return rows.reshape(len(checkpoints), -1)


def distances(sketches: Sketch) -> NDArray[np.float64]:
    """(N, N) estimated L2 distances between the rows of `sketches` (N, K)."""
    out = np.empty((len(sketches), len(sketches)))
    for number, sketch in enumerate(sketches):
        # Differences first: from products of norms a short distance would be lost in rounding.
        out[number] = np.sqrt(np.square(sketches - sketch).sum(1))
    return out


def cosine(one: Sketch, other: Sketch) -> float:
    """Estimated cosine between two checkpoints; 0 if one is all zeros."""
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    if norms:
        return float(one @ other) / norms
    return 0.0
