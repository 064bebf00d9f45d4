"""`Walk`: the base of the optimizers that are written here, over the local parts of parameters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from castalia.optim.layout import Layout, local


class Slot(NamedTuple):
    """A parameter with a gradient: what this rank holds of it, of its gradient and its state."""

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    layout: Layout


class Walk(torch.optim.Optimizer):
    """Calls `update` for each group with the parameters that have a gradient.

    State is what the member declares: local parts of tensors that are cut as the parameter, and
    whole statistics. `step`, on the CPU, counts the updates.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)
        self.layouts: dict[int, Layout] = {}
        """By the identity of a parameter's state: the parameter itself may be a copy of a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            slots = [self.slot(p) for p in group["params"] if p.grad is not None]
            if slots:
                self.update(group, slots)

    def slot(self, parameter: Tensor) -> Slot:
        """A parameter's tensors on this rank, its step counted."""
        layout = self.layouts.get(id(self.state[parameter]))
        if layout is None:
            layout = self.layouts[id(self.state[parameter])] = Layout(parameter)
        assert parameter.grad is not None
        state = {name: local(tensor) for name, tensor in self.state[parameter].items()}
        if "step" in state:
            state["step"] += 1
        return Slot(local(parameter), local(parameter.grad), state, layout)

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """Update the parameters of one group, in place."""
        raise NotImplementedError


def step_counter(updates: int) -> dict[str, Tensor]:
    """The counter of a `Walk`, on the CPU, where reading it waits for nothing."""
    return {"step": torch.full((), float(updates))}


def adamw_step(group: dict[str, Any], slots: Sequence[Slot]) -> None:
    """AdamW of torch for the parameters that an optimizer does not take itself; their state is
    exp_avg, exp_avg_sq and step."""
    slots = [slot for slot in slots if slot.weight.numel()]
    if not slots:
        return
    beta1, beta2 = group["betas"]
    steps = [slot.state["step"].to(slot.weight.device) - 1 for slot in slots]
    adamw(
        [slot.weight for slot in slots],
        [slot.gradient for slot in slots],
        [slot.state["exp_avg"] for slot in slots],
        [slot.state["exp_avg_sq"] for slot in slots],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
