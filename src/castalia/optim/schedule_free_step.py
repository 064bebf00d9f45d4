"""The update of schedule-free AdamW, element by element."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castalia.optim.layout import local
from castalia.optim.walk import Slot, Walk


class ScheduleFreeStep(Walk):
    """Between updates the parameters hold y."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """All parameters of a group at once."""
        beta1, beta2 = group["betas"]
        rate = group["lr"]
        count = float(slots[0].state["step"])
        share = share_of_average(group, slots)
        gradients = [slot.gradient for slot in slots]
        squares = [slot.state["exp_avg_sq"] for slot in slots]
        weights = [slot.weight for slot in slots]
        fast = [slot.state["z"] for slot in slots]
        average = [slot.state["x"] for slot in slots]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2**count)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(gradients, roots)
        if group["weight_decay"]:
            torch._foreach_add_(steps, weights, alpha=group["weight_decay"])
        torch._foreach_add_(fast, steps, alpha=-rate)
        torch._foreach_lerp_(average, fast, share)
        show(weights, fast, average, beta1)

    @torch.no_grad()
    def show_training(self) -> None:
        """Put y in the parameters, out of x and z."""
        for group in self.param_groups:
            parameters = group["params"]
            states = [self.state[parameter] for parameter in parameters]
            show(
                [local(parameter) for parameter in parameters],
                [local(state["z"]) for state in states],
                [local(state["x"]) for state in states],
                group["betas"][0],
            )


def show(weights: list[Tensor], fast: list[Tensor], average: list[Tensor], beta: float) -> None:
    """y = beta * x + (1 - beta) * z, by the same operation wherever it is made: to the last bit."""
    torch._foreach_copy_(weights, fast)
    torch._foreach_lerp_(weights, average, beta)


def share_of_average(group: dict[str, Any], slots: Sequence[Slot]) -> float:
    """The share c of this update in the average, counted in the state of each parameter."""
    count = float(slots[0].state["step"])
    total, largest = slots[0].state["seen"].tolist()
    largest = max(largest, group["lr"])
    weight = count ** group["power"] * largest ** group["lr_power"]
    total += weight
    seen = torch.tensor([total, largest], dtype=torch.float64)
    for slot in slots:
        slot.state["seen"].copy_(seen)
    return weight / total if total else 0.0
