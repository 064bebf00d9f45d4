"""Device meshes: the ranks arranged along named axes, and those axes folded for one purpose each.

`Degrees` lists the axes, outermost first. A folding makes mesh axes out of them, each the product
of neighbouring ones: sharding weights, sharing rows and summing a loss arrange the same ranks in
different ways. A new kind of parallelism is a new axis or a new folding: expert parallelism, for
instance, would split `dp_shard` x `cp` into `ep` and the rest.
"""

from math import prod

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from castalia.distributed.config import Degrees

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
    assert folded == degrees._fields, f"{folding} does not fold {degrees._fields}"
    sizes = tuple(prod(getattr(degrees, axis) for axis in axes) for axes in folding.values())
    return init_device_mesh(device, sizes, mesh_dim_names=tuple(folding))


def coordinate(rank: int, degrees: Degrees, axis: str) -> int:
    """The coordinate of `rank` along one axis of `Degrees`.

    Raises  KeyError for another name.
    """
    stride = 1
    for name, degree in reversed(degrees._asdict().items()):
        if name == axis:
            return rank // stride % degree
        stride *= degree
    raise KeyError(axis)
