"""Device meshes: the ranks arranged along named axes, and those axes folded for one purpose each.

`Degrees` lists the axes, outermost first. A folding makes mesh axes out of them, each the product
of neighbouring ones: sharding weights, sharing rows and summing a loss arrange the same ranks in
different ways. A new kind of parallelism is a new axis or a new folding: expert parallelism splits
the `dp_shard` of WEIGHTS once more, into the ranks that hold different experts and the rest.
"""

from math import prod

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from castalia.distributed.config import AXES, Degrees

Folding = dict[str, tuple[str, ...]]
"""Mesh axis -> the axes of `Degrees` whose product it is; together all of them, in order."""

WEIGHTS: Folding = {
    "pp": ("pp",),
    "dp_replicate": ("dp_replicate",),
    # Ranks that split a sequence run the same weights on other tokens, so FSDP2 shards over them
    # too.
    "dp_shard": ("dp_shard", "cp"),
    "tp": ("tp",),
}
"""How weights are split and copied."""
SEQUENCES: Folding = {
    "rows": ("pp", "dp_replicate", "dp_shard"),
    "cp": ("cp",),
    "tp": ("tp",),
}
"""Which ranks hold tokens of the same rows."""
LOSSES: Folding = {
    "parts": ("pp", "dp_replicate", "dp_shard", "cp"),
    # The ranks of one tp group compute the same loss, so it is summed along the other axes only.
    "tp": ("tp",),
}
"""Which ranks hold different addends of a batch's loss."""


def make_mesh(device: str, degrees: Degrees, folding: Folding) -> DeviceMesh:
    """The mesh of `folding` over all ranks. A collective call: it makes one process group per axis.

    `device` is `cpu` or `cuda`. Coordinates are the digits of the rank in mixed radix, tp fastest.
    """
    folded = tuple(axis for axes in folding.values() for axis in axes)
    assert folded == AXES, f"{folding} does not fold {AXES}"
    sizes = tuple(prod(getattr(degrees, axis) for axis in axes) for axes in folding.values())
    return init_device_mesh(device, sizes, mesh_dim_names=tuple(folding))


def make_expert_mesh(weights: DeviceMesh, degrees: Degrees) -> DeviceMesh:
    """The mesh of WEIGHTS with `dp_shard` split into `expert_shard` and `ep`: how experts are split
    and copied. A collective call.

    Both meshes have one root: FSDP2 shards over an axis of one what another axis has split.
    """
    # torch 2.13 has no public way to give one set of ranks two foldings with one root.
    sizes = (degrees.expert_shards, degrees.ep)
    return weights._unflatten("dp_shard", sizes, ("expert_shard", "ep"))


def coordinate(rank: int, degrees: Degrees, axis: str) -> int:
    """The coordinate of `rank` along one of AXES.

    Raises  KeyError for another name.
    """
    stride = 1
    for name in reversed(AXES):
        degree = getattr(degrees, name)
        if name == axis:
            return rank // stride % degree
        stride *= degree
    raise KeyError(axis)
