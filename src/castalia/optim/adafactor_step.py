"""The update of Adafactor, on parameters in any layout."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.optim.layout import reduce_together
from castalia.optim.walk import Slot, Walk


class AdafactorStep(Walk):
    """Means of rows, columns and of the whole parameter are taken over all ranks."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """Sums of all parameters travel together: those of the gradients and weights, then those of
        the updates."""
        layouts = [slot.layout for slot in slots]
        sums = [sums_of(slot) for slot in slots]
        reduce_together(layouts, sums, dist.ReduceOp.SUM)
        for slot, total in zip(slots, sums, strict=True):
            self.learn(slot, total[1:], group)
        updates = [self.direction(slot, group) for slot in slots]
        squares = [update.square().sum().view(1) for update in updates]
        reduce_together(layouts, squares, dist.ReduceOp.SUM)
        for slot, update, total, square in zip(slots, updates, sums, squares, strict=True):
            numbers = max(1, math.prod(slot.layout.shape))
            # Tensors to the end: a number would make the host wait for the device.
            size = (total[0] / numbers).sqrt().clamp(min=group["smallest"])
            excess = ((square[0] / numbers).sqrt() / group["threshold"]).clamp(min=1)
            rate = size / excess * min(group["lr"], float(slot.state["step"]) ** -0.5)
            slot.weight.mul_(1 - group["lr"] * group["weight_decay"])
            slot.weight.sub_(update.mul_(rate))

    def learn(self, slot: Slot, squares: Tensor, group: dict[str, Any]) -> None:
        """Move the second moment towards the squares of this gradient."""
        weight = float(slot.state["step"]) ** group["beta2_decay"]
        if "variance" in slot.state:
            slot.state["variance"].lerp_(slot.gradient.square(), weight)
            return
        rows, columns = slot.layout.shape
        slot.state["row_var"].lerp_(squares[:rows].view(-1, 1) / columns, weight)
        slot.state["col_var"].lerp_(squares[rows:].view(1, -1) / rows, weight)

    def direction(self, slot: Slot, group: dict[str, Any]) -> Tensor:
        """The gradient over the root of its second moment; local."""
        least = group["eps"] ** 2
        if "variance" in slot.state:
            return slot.gradient * slot.state["variance"].clamp(min=least).rsqrt_()
        update = torch.empty_like(slot.gradient)
        row_var = slot.state["row_var"]
        mean = row_var.mean().clamp_(min=group["eps"])
        gradients = slot.layout.parts(slot.gradient)
        for (box, out), (_, gradient) in zip(slot.layout.parts(update), gradients, strict=True):
            rows, columns = box.slices
            moment = row_var[rows] @ slot.state["col_var"][:, columns]
            torch.mul(moment.div_(mean).clamp_(min=least).rsqrt_(), gradient, out=out)
        return update


def sums_of(slot: Slot) -> Tensor:
    """(1 + R + C,) or (1,): the sum of the squared weights, then, for a matrix, the sums of the
    squared gradients of its rows and columns, over this rank's parts."""
    total = slot.weight.square().sum().view(1)
    if "row_var" not in slot.state:
        return total
    rows, columns = slot.layout.shape
    sums = total.new_zeros(1 + rows + columns)
    sums[:1] = total
    by_row = sums[1 : 1 + rows]
    by_column = sums[1 + rows :]
    for box, gradient in slot.layout.parts(slot.gradient):
        own_rows, own_columns = box.slices
        by_row[own_rows] += gradient.square().sum(1)
        by_column[own_columns] += gradient.square().sum(0)
    return sums
