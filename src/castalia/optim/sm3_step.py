"""The update of SM3, on parameters in any layout."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.distributed.boxes import Box
from castalia.optim.layout import reduce_together
from castalia.optim.walk import Slot, Walk


class SM3Step(Walk):
    """The maxima over the other dimensions are taken over all ranks."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """Two walks: the maxima of all parameters travel together between them."""
        moments = []
        maxima: list[Tensor] = []
        for slot in slots:
            inner = [
                self.moment(slot, box, g, group) for box, g in slot.layout.parts(slot.gradient)
            ]
            moments.append(inner)
            maxima.append(self.largest(slot, inner))
        reduce_together([slot.layout for slot in slots], maxima, dist.ReduceOp.MAX)
        for slot, inner, largest in zip(slots, moments, maxima, strict=True):
            self.keep(slot, largest, group["beta"])
            self.move(slot, inner, group)

    def moment(self, slot: Slot, box: Box, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """The estimate of g^2 of one part: the least of its statistics, and its own square."""
        parts = [part_of(tensor, box) for tensor in statistics(slot)]
        # Made in the layout of the gradient: a copy of an expanded column has another.
        least = torch.empty_like(gradient).copy_(parts[0])
        for part in parts[1:]:
            torch.minimum(least, part, out=least)
        if group["beta"]:
            least *= group["beta"]
        return least.addcmul_(gradient, gradient, value=1 - group["beta"])

    def largest(self, slot: Slot, moments: Sequence[Tensor]) -> Tensor:
        """The maxima of this rank's parts, those of all dimensions one after the other."""
        wholes = [torch.zeros_like(tensor) for tensor in statistics(slot)]
        for (box, _), moment in zip(slot.layout.parts(slot.gradient), moments, strict=True):
            if not moment.numel():
                continue
            for dim, whole in enumerate(wholes):
                others = tuple(other for other in range(moment.ndim) if other != dim)
                mine = part_of(whole, box)
                most = moment.amax(others, keepdim=True) if others else moment
                torch.maximum(mine, most, out=mine)
        return torch.cat([whole.flatten() for whole in wholes])

    def keep(self, slot: Slot, largest: Tensor, beta: float) -> None:
        """Write the statistics."""
        tensors = statistics(slot)
        parts = largest.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            new = part.view_as(tensor)
            if beta:
                torch.maximum(tensor, new, out=tensor)
            else:
                tensor.copy_(new)

    def move(self, slot: Slot, moments: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update the weights of this rank."""
        update = torch.empty_like(slot.gradient)
        pairs = zip(
            slot.layout.parts(update), slot.layout.parts(slot.gradient), moments, strict=True
        )
        for (_, out), (_, gradient), moment in pairs:
            torch.mul(moment.add_(group["eps"]).rsqrt_(), gradient, out=out)
        if group["momentum"]:
            update = slot.state["momentum_buffer"].lerp_(update, 1 - group["momentum"])
        slot.weight.mul_(1 - group["lr"] * group["weight_decay"])
        slot.weight.add_(update, alpha=-group["lr"])


def statistics(slot: Slot) -> list[Tensor]:
    """The whole statistics of all dimensions."""
    return [slot.state[f"accumulator_{dim}"] for dim in range(max(1, slot.gradient.ndim))]


def part_of(statistic: Tensor, box: Box) -> Tensor:
    """The part of a statistic that belongs to the part `box` of the parameter."""
    slices = [
        part if size > 1 else slice(None)
        for part, size in zip(box.slices, statistic.shape, strict=True)
    ]
    return statistic[tuple(slices)]
