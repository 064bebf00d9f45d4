"""Lay one model over the ranks. The order is the contract: EP, TP, CP, compile, FSDP2, materialize,
start.

Each step sees the model as the one before leaves it: FSDP2 must shard what tensor parallelism has
split, and wrap blocks that are compiled already, or the collectives would be traced into them.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from castalia.core.private_cache import keep_compiled_code_private
from castalia.distributed.boxes import local_boxes
from castalia.distributed.config import ParallelConfig
from castalia.distributed.context_parallel import share_rows
from castalia.distributed.expert_parallel import shard_dim, share_experts
from castalia.distributed.tensor_parallel import split_matrices
from castalia.distributed.world import World
from castalia.experts.layer import Experts
from castalia.experts.router import Router

M = TypeVar("M", bound=nn.Module)


class Sliceable(Protocol):
    """A whole parameter of which any slice can be read: a tensor, or a stored one read in
    slices."""

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor: ...


def parallelize(
    model: M,
    world: World,
    config: ParallelConfig,
    *,
    compiled: bool = False,
    policy: MixedPrecisionPolicy | None = None,
) -> M:
    """Split experts and matrices, compile blocks, shard with FSDP2, and allocate the model on the
    world's device.

    The model comes in on the meta device and leaves with uninitialized weights; `initialize` or a
    checkpoint fills them. It declares `layers` (its blocks) and the `tp_plan` of its modules;
    `row_share` and `head_share` are set here. `policy` says in which dtype FSDP2 gathers weights
    and sums gradients, by default in their own.
    """
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    if world.mesh is not None:
        share_experts(model, world)
    if world.mesh is not None and world.degrees.tp > 1:
        split_matrices(model, world.mesh["tp"])
    if world.sequence is not None:
        share_rows(model, world.sequence)
    if compiled:
        keep_compiled_code_private()
        if world.degrees.tp > 1:
            # torch 2.13: the cache on disk finds a compiled block by its mesh, but the block has
            # the names of the process groups of the run that compiled it. Another layout, or a
            # second run in this process, names them otherwise and would not find its group.
            functorch.enable_autograd_cache = False
        for layer in layers:
            layer.compile()
    if world.mesh is not None:
        shard(model, world, config, policy or MixedPrecisionPolicy(cast_forward_inputs=False))
    model.to_empty(device=world.device)
    return model


def shard(
    model: nn.Module, world: World, config: ParallelConfig, policy: MixedPrecisionPolicy
) -> None:
    """Wrap the blocks and the model with FSDP2; experts that ranks split have a mesh of their
    own."""
    assert world.mesh is not None
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    # A split backward comes back to a block's weights for their gradients. FSDP2 gathers them for
    # the first half only, so they must stay gathered between the two.
    reshard = config.reshard_after_forward and not config.splits_backward
    mesh = data_mesh(world.mesh, config, "dp_shard")
    placement = expert_placement(model, world, config)
    biases = keep_biases_whole(model, world.mesh)
    for layer in layers:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=reshard,
            shard_placement_fn=placement,
            mp_policy=policy,
            ignored_params=biases,
        )
    # The loss uses the head outside the model's own forward, so the root keeps its weights
    # gathered until the backward.
    fully_shard(
        model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=biases
    )
    sum_gradients(model)


def keep_biases_whole(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """The biases of loss-free balancing, as copies on all ranks of the stage.

    They move by steps that bf16, in which FSDP2 may gather weights, rounds away.
    """
    axes = tuple(axis for axis in mesh.mesh_dim_names or () if axis != "pp")
    biases = set()
    for router in model.modules():
        if not isinstance(router, Router) or router.bias is None:
            continue
        # Values come later, as those of all parameters.
        values = torch.empty(router.bias.shape, device="meta")
        copies = [Replicate()] * len(axes)
        whole = distribute_tensor(values, mesh[axes], copies, src_data_rank=None)
        router.bias = nn.Parameter(whole, requires_grad=False)
        biases.add(router.bias)
    return biases


def data_mesh(mesh: DeviceMesh, config: ParallelConfig, axis: str) -> DeviceMesh:
    """The ranks over which weights are sharded, along the last axis of the mesh, and copied."""
    # A 2-D mesh means HSDP: sharded along its last axis, replicated along its first.
    return mesh["dp_replicate", axis] if config.dp_replicate > 1 else mesh[axis]


def expert_placement(
    model: nn.Module, world: World, config: ParallelConfig
) -> Callable[[nn.Parameter], Shard | ShardPlacementResult | None] | None:
    """How FSDP2 shards experts, which need another dim than dim 0 or other ranks than the rest of
    their layer; None for a model without experts."""
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    shards = world.degrees.expert_shards
    dims = {p: Shard(shard_dim(shards, p)) for stack in stacks for p in stack.parameters()}
    if not dims:
        return None
    if world.experts is None:
        return dims.get
    # A mesh by parameter and not FSDP2 on the experts' own module: its hooks would run inside of
    # the block, where recompute counts the operators of both forward passes and finds others.
    mesh = data_mesh(world.experts, config, "expert_shard")
    ranks = FSDPMeshInfo(mesh, shard_mesh_dim=0)
    if mesh.ndim == 2:
        ranks = HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    placements = {p: ShardPlacementResult(dim, ranks) for p, dim in dims.items()}
    return placements.get


def sum_gradients(model: nn.Module) -> None:
    """Make FSDP2 sum gradients instead of averaging them; see `castalia.distributed.gradients`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # The factor alone asks for NCCL's PreMulSum, which gloo lacks; plain sums run on both.
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def initialize(model: nn.Module, start: Callable[[str, Any], Sliceable]) -> None:
    """Fill every parameter with its part of `start(name, global shape)`.

    The start is a function of the whole parameter, so that no layout changes a weight.
    """
    for name, parameter in model.named_parameters():
        fill(parameter, start(name, parameter.shape))


def fill(parameter: Tensor, whole: Sliceable) -> None:
    """Copy this rank's part of `whole` into `parameter`, in the parameter's dtype."""
    local = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
    for box, place in local_boxes(parameter):
        local[place.slices].copy_(whole[box.slices])
