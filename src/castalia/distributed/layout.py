"""Lay one model over the processes. The order is the contract: recompute, compile, FSDP2, materialize."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from castalia.distributed.config import ParallelConfig
from castalia.distributed.world import World

M = TypeVar("M", bound=nn.Module)


def parallelize(model: M, world: World, config: ParallelConfig, *, compiled: bool = False) -> M:
    """Compile blocks, shard them with FSDP2 and give the model memory on the world's device.

    The model comes in on the meta device and leaves with weights that hold nothing yet; initialize or load next.
    What the model declares: `layers`, its list of blocks.
    """
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    if compiled:
        for layer in layers:
            layer.compile()
    if world.mesh is not None:
        mesh = world.mesh["dp_replicate", "dp_shard"] if config.dp_replicate > 1 else world.mesh["dp_shard"]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        # The head runs outside the model's own forward, so the root keeps its weights gathered until the backward.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.to_empty(device=world.device)
    return model


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
    """The slice of `whole` that this process holds of `sharded`."""
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, start if size else 0, size)
    return whole
