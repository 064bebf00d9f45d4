"""The update of SOAP, on parameters in any layout."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castalia.optim.walk import Slot, Walk

SIDES = (("rows", 0), ("columns", 1))
"""Names of a matrix's dimensions in the state."""


class SOAPStep(Walk):
    """Whole matrices on every rank; what is kept of them is cut as the parameter."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """Each parameter by itself."""
        for slot in slots:
            gradient = slot.layout.gather(slot.gradient)
            if slot.state["step"] == 1:
                # The first gradient would be judged by a basis that it made itself.
                learn(slot, gradient, group)
                for name, _ in sides_of(slot):
                    slot.state[f"{name}_basis"].copy_(eigenvectors(slot.state[f"{name}_statistic"]))
                continue
            self.move(slot, gradient, group)
            learn(slot, gradient, group)
            if (float(slot.state["step"]) - 1) % group["every"] == 0:
                self.turn(slot)

    def move(self, slot: Slot, gradient: Tensor, group: dict[str, Any]) -> None:
        """One update of Adam in the basis."""
        beta1, beta2 = group["betas"]
        updates = float(slot.state["step"]) - 1
        average = slot.state["exp_avg"].lerp_(slot.gradient, 1 - beta1)
        square = slot.layout.gather(slot.state["exp_avg_sq"])
        square = square.lerp(turned(slot, gradient).square(), 1 - beta2)
        slot.layout.scatter(square, slot.state["exp_avg_sq"])
        first = turned(slot, slot.layout.gather(average))
        direction = turned(slot, first / square.sqrt().add_(group["eps"]), back=True)
        rate = group["lr"] * math.sqrt(1 - beta2**updates) / (1 - beta1**updates)
        for box, part in slot.layout.parts(slot.weight):
            part.add_(direction[box.slices], alpha=-rate)
        slot.weight.mul_(1 - group["lr"] * group["weight_decay"])

    def turn(self, slot: Slot) -> None:
        """Renew the eigenvectors, and put the second moments in their new order."""
        square = slot.layout.gather(slot.state["exp_avg_sq"])
        for name, dim in sides_of(slot):
            basis = slot.state[f"{name}_basis"]
            product = slot.state[f"{name}_statistic"] @ basis
            order = (basis * product).sum(0).argsort(descending=True, stable=True)
            square = square.index_select(dim, order)
            basis.copy_(torch.linalg.qr(product.index_select(1, order)).Q)
        slot.layout.scatter(square, slot.state["exp_avg_sq"])


def sides_of(slot: Slot) -> list[tuple[str, int]]:
    """The dimensions of a parameter that have statistics."""
    return [(name, dim) for name, dim in SIDES if f"{name}_basis" in slot.state]


def learn(slot: Slot, gradient: Tensor, group: dict[str, Any]) -> None:
    """Move the statistics towards those of a whole gradient."""
    for name, dim in sides_of(slot):
        product = gradient @ gradient.mT if dim == 0 else gradient.mT @ gradient
        slot.state[f"{name}_statistic"].lerp_(product, 1 - group["statistics_beta"])


def turned(slot: Slot, matrix: Tensor, *, back: bool = False) -> Tensor:
    """A whole matrix in the eigenbasis, or back out of it."""
    for name, dim in sides_of(slot):
        basis = slot.state[f"{name}_basis"]
        basis = basis.mT if back else basis
        matrix = basis.mT @ matrix if dim == 0 else matrix @ basis
    return matrix


def eigenvectors(statistic: Tensor) -> Tensor:
    """Eigenvectors in columns, those of the largest eigenvalues first."""
    ridge = 1e-30 * torch.eye(len(statistic), device=statistic.device, dtype=statistic.dtype)
    return torch.linalg.eigh(statistic + ridge).eigenvectors.flip(1)
