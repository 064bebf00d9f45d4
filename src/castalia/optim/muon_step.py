"""The update of Muon, on parameters in any layout."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castalia.optim.walk import Slot, Walk, adamw_step

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration; they are steep at 0 and end near 1, between 0.7 and 1.2."""
LEAST_NORM = 1e-7


class MuonStep(Walk):
    """A parameter with a momentum buffer is a matrix of a block; the others take AdamW."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """Both kinds of one group."""
        adamw_step(group, [slot for slot in slots if "momentum_buffer" not in slot.state])
        matrices = [slot for slot in slots if "momentum_buffer" in slot.state]
        by_shape: dict[tuple[int, ...], list[Slot]] = {}
        for slot in matrices:
            by_shape.setdefault(slot.layout.shape, []).append(slot)
        for shape, same in by_shape.items():
            self.update_matrices(group, shape, same)

    def update_matrices(
        self, group: dict[str, Any], shape: tuple[int, ...], slots: Sequence[Slot]
    ) -> None:
        """Matrices of one shape, in batches of products."""
        wholes = [slot.layout.gather(self.momentum(slot, group)) for slot in slots]
        if len(shape) == 3:
            # A stack of experts, each a matrix by itself.
            for slot, whole in zip(slots, wholes, strict=True):
                parts = [self.directions(part, group) for part in whole.split(AT_ONCE)]
                move(slot, torch.cat(parts), group)
            return
        # A few at a time: the iterations keep four copies.
        for begin in range(0, len(slots), AT_ONCE):
            directions = self.directions(torch.stack(wholes[begin : begin + AT_ONCE]), group)
            for slot, direction in zip(slots[begin : begin + AT_ONCE], directions, strict=True):
                move(slot, direction, group)

    def directions(self, batch: Tensor, group: dict[str, Any]) -> Tensor:
        """The orthogonal matrices near those of a batch, (N, R, C) -> (N, R, C)."""
        near = orthogonalized(batch.to(arithmetic(group, batch)), group["ns_steps"])
        return near.to(batch.dtype)

    def momentum(self, slot: Slot, group: dict[str, Any]) -> Tensor:
        """The local momentum after this gradient, or what it will be after another like it."""
        buffer = slot.state["momentum_buffer"].lerp_(slot.gradient, 1 - group["momentum"])
        return slot.gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def move(slot: Slot, direction: Tensor, group: dict[str, Any]) -> None:
    """Decay what is here of a matrix, or of a stack, and step along the whole direction."""
    slot.weight.mul_(1 - group["lr"] * group["weight_decay"])
    rate = group["lr"] * scale_of(group["scale"], slot.layout.shape[-2:])
    for box, part in slot.layout.parts(slot.weight):
        part.add_(direction[box.slices], alpha=-rate)


AT_ONCE = 8
"""Matrices in one batch of products."""


def arithmetic(group: dict[str, Any], matrix: Tensor) -> torch.dtype:
    """The dtype of the iterations: bf16 pays on GPUs alone."""
    name = group["arithmetic"]
    if name == "bf16" or (name == "auto" and matrix.is_cuda):
        return torch.bfloat16
    return matrix.dtype


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """UV^T of each matrix USV^T, nearly: singular values end between 0.7 and 1.2.

    Shapes  (N, R, C) -> (N, R, C).
    Source  Jordan et al. 2024, the Newton-Schulz iteration of Muon.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # The spectral norm is at most this one, and must be at most 1.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def scale_of(name: str, shape: tuple[int, ...]) -> float:
    """Factor on the rate of a matrix of this shape."""
    rows, columns = shape
    if name == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
