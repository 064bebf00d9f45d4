"""Processes and the layout of one model over them: FSDP2 over gloo or nccl."""

from castalia.distributed.config import ParallelConfig
from castalia.distributed.parallelize import initialize, parallelize
from castalia.distributed.world import World, check_layout, environment

__all__ = ["ParallelConfig", "World", "check_layout", "environment", "initialize", "parallelize"]
