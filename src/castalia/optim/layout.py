"""Where a parameter's parts lie on the ranks, for optimizers that need more than single numbers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from castalia.distributed.boxes import Box, local_boxes
from castalia.optim.base import StateTensor, Weight


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; writing to it writes to the tensor."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def are_plain(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether no parameter is sharded: torch 2.13 has no rule for some kernels over many
    parameters, such as that of SGD, on sharded ones."""
    return not any(isinstance(p, DTensor) for group in groups for p in group["params"])


class Layout:
    """The parts of one parameter on this rank and the ranks that hold the others.

    On one rank there is a single part, the whole, and no collective.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.shape = tuple(parameter.shape)
        self.boxes = local_boxes(parameter)
        self.groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            self.groups = tuple(
                mesh.get_group(axis)
                for axis, placement in enumerate(parameter.placements)
                if not placement.is_replicate() and mesh.size(axis) > 1
            )

    def parts(self, values: Tensor) -> list[tuple[Box, Tensor]]:
        """Each part of a local tensor, with its box in the whole."""
        return [(box, values[place.slices]) for box, place in self.boxes]

    def gather(self, values: Tensor) -> Tensor:
        """The whole tensor, of which `values` is local; a collective call."""
        if not self.groups:
            return values
        whole = values.new_zeros(self.shape)
        for box, part in self.parts(values):
            whole[box.slices] = part
        # Every number comes from one rank, so that the sum with zeros is exact.
        reduce_over(self.groups, whole, dist.ReduceOp.SUM)
        return whole

    def scatter(self, whole: Tensor, values: Tensor) -> None:
        """Write this rank's parts of `whole` to the local tensor `values`."""
        for box, part in self.parts(values):
            part.copy_(whole[box.slices])


def reduce_over(
    groups: Sequence[dist.ProcessGroup], values: Tensor, operation: dist.ReduceOp.RedOpType
) -> None:
    """Reduce `values` in place over the ranks of all axes."""
    for group in groups:
        dist.all_reduce(values, operation, group=group)


def reduce_together(
    layouts: Sequence[Layout], values: Sequence[Tensor], operation: dist.ReduceOp.RedOpType
) -> None:
    """Reduce one tensor for each parameter in place over the ranks that share the parameter.

    Statistics are small and many: those of the same ranks travel in one collective.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for layout, tensor in zip(layouts, values, strict=True):
        if layout.groups:
            by_groups.setdefault(layout.groups, []).append(tensor)
    # In the order of the parameters, which every rank has alike.
    for groups, tensors in by_groups.items():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        reduce_over(groups, flat, operation)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


def make_state(parameter: Tensor, weight: Weight, declared: StateTensor) -> Tensor | None:
    """A state tensor of a parameter before the first step; None if it has none of this one."""
    shape = declared.shape(weight)
    dtype = getattr(torch, declared.dtype)
    if shape is None:
        return None
    if declared.start == "weights":
        return parameter.detach().clone().to(dtype)
    if shape == tuple(parameter.shape) and not declared.whole:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    placements: Sequence[Placement] = [Replicate()] * parameter.device_mesh.ndim
    own = shape
    if not declared.whole:
        placements = parameter.placements
        sizes = zip(local(parameter).shape, parameter.shape, shape, strict=True)
        own = tuple(part * size // whole for part, whole, size in sizes)
    values = torch.zeros(own, dtype=dtype, device=local(parameter).device)
    like = torch.empty(shape, dtype=dtype, device="meta")
    return DTensor.from_local(
        values,
        parameter.device_mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
