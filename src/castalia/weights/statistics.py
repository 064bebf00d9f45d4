"""Statistics of one tensor of weights, and of tensors together: size, moments, spectrum, travel.

Source  the quantities that PolyPythias follows (van der Wal et al. 2025, arXiv:2503.09543).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20
"""Elements that are turned to float64 at a time: 8 MB of each tensor."""
QUANTILES = (0.1, 0.5, 0.9)
SPECTRUM = (
    *("spectral_norm", "stable_rank", "participation"),
    *(f"singular_{round(100 * share)}" for share in QUANTILES),
)
"""Columns of `spectrum`."""


@dataclass
class Sums:
    """Sums over elements, from which the statistics of tensors together follow."""

    elements: int = 0
    absolute: float = 0.0
    first: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        # Python's max drops NaN or keeps it, as the order is.
        values["largest"] = float(np.maximum(self.largest, other.largest))
        return Sums(**values)

    def statistics(self) -> dict[str, Any]:
        """L1 and L2 norm, mean, variance, kurtosis (3 for a normal distribution) and the largest
        absolute value."""
        count = max(self.elements, 1)
        mean = self.first / count
        second = self.second / count
        variance = max(second - mean**2, 0.0)
        # The fourth central moment from the raw ones.
        fourth = self.fourth / count - 4 * mean * self.third / count
        fourth += 6 * mean**2 * second - 3 * mean**4
        return {
            "elements": self.elements,
            "l1": self.absolute,
            "l2": self.second**0.5,
            "mean": mean,
            "variance": variance,
            "kurtosis": fourth / variance**2 if variance > 1e-12 * second else None,
            "largest": self.largest,
        }


@dataclass
class Between:
    """Sums over the elements of two tensors: how far they are apart, and at which angle."""

    squares: float = 0.0
    """Of the differences."""
    product: float = 0.0
    own: float = 0.0
    """Squares of the first."""
    other: float = 0.0
    """Squares of the second."""

    def __add__(self, other: "Between") -> "Between":
        return Between(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    @property
    def distance(self) -> float:
        """L2 distance."""
        return self.squares**0.5

    @property
    def cosine(self) -> float | None:
        """Cosine; None where one is all zeros."""
        norms = (self.own * self.other) ** 0.5
        if norms:
            return self.product / norms
        return None


def sums_of(tensor: Tensor) -> Sums:
    """The sums over a tensor's elements, in float64."""
    total = Sums()
    for block in blocks(tensor):
        squares = block * block
        total += Sums(
            elements=block.numel(),
            absolute=float(block.abs().sum()),
            first=float(block.sum()),
            second=float(squares.sum()),
            third=float((squares * block).sum()),
            fourth=float((squares * squares).sum()),
            largest=float(block.abs().max()),
        )
    return total


def between(tensor: Tensor, other: Tensor) -> Between:
    """The sums over two tensors of one shape, in float64."""
    total = Between()
    for block, its in zip(blocks(tensor), blocks(other), strict=True):
        apart = block - its
        total += Between(
            float(apart @ apart), float(block @ its), float(block @ block), float(its @ its)
        )
    return total


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in float64, some at a time."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        yield flat[start : start + BLOCK].double()


def summed(parts: Iterable[Between]) -> Between | None:
    """Several together; None for none."""
    total: Between | None = None
    for part in parts:
        if total is None:
            total = part
        else:
            total = total + part
    return total


def spectrum(matrix: Tensor) -> dict[str, float]:
    """What the singular values of a matrix say; NaN of one with NaN or infinite elements.

    spectral_norm   the largest one
    stable_rank     (squared Frobenius norm) / (squared spectral norm)
    participation   (sum of squares)^2 / (sum of fourth powers), the number of directions that
                    carry the matrix
    singular_10, singular_50, singular_90   quantiles of the values
    """
    # Eigenvalues of the smaller Gram matrix: an embedding of 50,000 rows needs 512 of them.
    wide = matrix.reshape(matrix.shape[0], -1).double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    gram = wide @ wide.T
    if not gram.isfinite().all():
        # A diverged checkpoint is a row of the table; eigvalsh raises an error of its own.
        return dict.fromkeys(SPECTRUM, math.nan)
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)
    largest = float(squares.max())
    total = float(squares.sum())
    values = {
        "spectral_norm": largest**0.5,
        "stable_rank": total / largest if largest else 0.0,
        "participation": total**2 / float((squares**2).sum()) if largest else 0.0,
    }
    points = torch.tensor(QUANTILES, dtype=torch.float64)
    for share, value in zip(QUANTILES, torch.quantile(squares.sqrt(), points), strict=True):
        values[f"singular_{round(100 * share)}"] = float(value)
    return values
