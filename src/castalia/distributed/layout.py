"""Lay one model over the processes. The order is the contract: TP, CP, recompute, compile, FSDP2, materialize."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from castalia.distributed.config import ParallelConfig
from castalia.distributed.context_parallel import share_rows
from castalia.distributed.tensor_parallel import split_matrices
from castalia.distributed.world import World

M = TypeVar("M", bound=nn.Module)


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
def initialize(model: nn.Module, draw: Callable[[str, Any], Tensor]) -> None:
    """Fill every parameter with `draw(name, global shape)`; each process keeps its part, so no layout changes it."""
    for name, parameter in model.named_parameters():
        whole = draw(name, parameter.shape)
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(own_part(whole, parameter))
        else:
            parameter.copy_(whole)


def own_part(whole: Tensor, sharded: DTensor) -> Tensor:
    """The slice of `whole` that this process holds of `sharded`: tp has cut first, FSDP what tp left."""
    mesh = sharded.device_mesh
    for axis in reversed(range(mesh.ndim)):
        dim = getattr(sharded.placements[axis], "dim", None)
        if dim is not None:
            length = -(-whole.shape[dim] // mesh.size(axis))
            start = min(length * mesh.get_local_rank(axis), whole.shape[dim])
            whole = whole.narrow(dim, start, min(length, whole.shape[dim] - start))
    return whole
