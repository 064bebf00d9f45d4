"""The update of MADGRAD, element by element."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from castalia.optim.walk import Slot, Walk


class MadgradStep(Walk):
    """All parameters of a group at once."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """The sums grow by the weight of this update, and the weights move towards their dual
        average."""
        # As the authors' code: a small rate weighs gradients that would leave no trace in fp32.
        rate = group["lr"] + group["eps"] if group["lr"] else 0.0
        weight = rate * math.sqrt(float(slots[0].state["step"]))
        weights = [slot.weight for slot in slots]
        sums = [slot.state["s"] for slot in slots]
        squares = [slot.state["grad_sum_sq"] for slot in slots]
        gradients = [slot.gradient for slot in slots]
        decay = group["weight_decay"]
        if decay and not group["decoupled"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        torch._foreach_addcmul_(squares, gradients, gradients, value=weight)
        torch._foreach_add_(sums, gradients, alpha=weight)
        roots = torch._foreach_pow(squares, 1 / 3)
        torch._foreach_add_(roots, group["eps"])
        duals = torch._foreach_addcdiv([slot.state["x0"] for slot in slots], sums, roots, value=-1)
        if decay and group["decoupled"]:
            torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_lerp_(weights, duals, 1 - group["momentum"])
