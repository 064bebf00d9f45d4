"""Degrees of parallelism."""

from pydantic import PositiveInt

from castalia.config.base import Config


class ParallelConfig(Config):
    """Processes along each mesh axis."""

    dp_replicate: PositiveInt = 1
    """Copies of the whole sharded model (HSDP)."""
    dp_shard: PositiveInt | None = None
    """Processes that share one copy of weights and optimizer (FSDP2); null takes all that are left."""
    tp: PositiveInt = 1
    """Processes that split each matrix."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    cp: PositiveInt = 1
    """Processes that split each sequence."""
    reshard_after_forward: bool = True
    """Drop gathered weights after each block's forward (ZeRO 3); false keeps them until the backward (ZeRO 2)."""
