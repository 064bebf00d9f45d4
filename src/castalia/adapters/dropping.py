"""Dropout of what an addition reads, by place as all dropout of the house."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.models.parts.dropout import Draws, kept, mix, scaled


def drop_input(x_BTI: Tensor, draws: Draws, place: int, rate: float) -> Tensor:
    """The input of a linear layer with a share of its numbers dropped.

    Shapes  (B, T, I), T all tokens held here. Under tensor parallelism a DTensor, either whole on
            every rank or split by its last dim.
    """
    own = draws.at(place)
    first = 0
    local = x_BTI
    if isinstance(x_BTI, DTensor):
        local = x_BTI.to_local()
        if x_BTI.placements[0].is_shard(dim=x_BTI.ndim - 1):
            # By the number of the channel in the whole layer: every split drops the same.
            first = x_BTI.device_mesh.get_local_rank() * local.shape[-1]
    channels = first + torch.arange(local.shape[-1], device=local.device)
    low = mix(own.low[:, None], own.tokens)
    high = mix(own.high[:, None], own.tokens)
    keep = kept(low, high, channels, rate)
    if isinstance(x_BTI, DTensor):
        keep = DTensor.from_local(keep, x_BTI.device_mesh, x_BTI.placements, run_check=False)
    return scaled(x_BTI, keep, rate)
