"""Lay one model over the processes. The order is the contract: recompute, compile, FSDP2, materialize."""

from torch import nn
from torch.distributed.fsdp import fully_shard

from castalia.distributed.config import ParallelConfig
from castalia.distributed.world import World


def parallelize(model: nn.Module, world: World, config: ParallelConfig, *, compiled: bool = False) -> nn.Module:
    """Compile blocks, shard them with FSDP2 and give the model memory on the world's device.

    The model comes in on the meta device and leaves with weights that hold nothing yet; initialize or load next.
    What the model declares: `layers`, its list of blocks.
    """
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    if compiled:
        for layer in layers:
            layer.compile()
    if world.mesh is not None:
        mesh = world.mesh if config.dp_replicate > 1 else world.mesh["dp_shard"]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        # The head runs outside the model's own forward, so the root keeps its weights gathered until the backward.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.to_empty(device=world.device)
    return model
