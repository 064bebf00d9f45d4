"""Lay one model over the processes. The order is the contract: TP, CP, recompute, compile, FSDP2, materialize."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from castalia.distributed.boxes import local_boxes
from castalia.distributed.config import ParallelConfig
from castalia.distributed.context_parallel import share_rows
from castalia.distributed.tensor_parallel import split_matrices
from castalia.distributed.world import World

M = TypeVar("M", bound=nn.Module)


class Sliceable(Protocol):
    """Values of a whole parameter of which any part can be read: a tensor, or a stored one read part by part."""

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor: ...


def parallelize(model: M, world: World, config: ParallelConfig, *, compiled: bool = False) -> M:
    """Split matrices, compile blocks, shard them with FSDP2 and give the model memory on the world's device.

    The model comes in on the meta device and leaves with weights that hold nothing yet; initialize or load next.
    What the model declares: `layers`, its list of blocks, the `tp_plan` of its modules, and its `row_share` and
    `head_share`, which are set here.
    """
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    if world.mesh is not None and world.degrees.tp > 1:
        split_matrices(model, world.mesh["tp"])
    if world.sequence is not None:
        share_rows(model, world.sequence)
    if compiled:
        for layer in layers:
            layer.compile()
    if world.mesh is not None:
        mesh = (
            world.mesh["dp_replicate", "dp_shard"]
            if config.dp_replicate > 1
            else world.mesh["dp_shard"]
        )
        # Weights that are gone between the two halves of a split backward would not be found by the second.
        reshard = config.reshard_after_forward and not config.splits_backward
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        # The head runs outside the model's own forward, so the root keeps its weights gathered until the backward.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        sum_gradients(model)
    model.to_empty(device=world.device)
    return model


def sum_gradients(model: nn.Module) -> None:
    """Make FSDP2 add gradients up where it would average them; see `castalia.distributed.gradients`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A factor alone asks for NCCL's PreMulSum, which gloo does not have; plain sums run everywhere.
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def initialize(model: nn.Module, start: Callable[[str, Any], Sliceable]) -> None:
    """Fill every parameter with its part of `start(name, global shape)`, so that no layout changes a weight."""
    for name, parameter in model.named_parameters():
        fill(parameter, start(name, parameter.shape))


def fill(parameter: Tensor, whole: Sliceable) -> None:
    """Copy this rank's part of `whole` into `parameter`, in the parameter's dtype."""
    local = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
    for box, place in local_boxes(parameter):
        local[place.slices].copy_(whole[box.slices])
