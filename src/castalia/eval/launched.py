"""The ranks of a launcher as one evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from castalia.core.ranks import environment
from castalia.distributed.join import join, leave
from castalia.eval.shares import ALONE, Share

JOIN_SECONDS = 1800.0
"""Longest wait for the other ranks, also while one of them loads or builds more."""


@contextmanager
def launched() -> Iterator[Share]:
    """This rank's share under torchrun, mpirun, srun and their like; ALONE without a launcher.

    Raises  ConfigError if the launcher's variables are wrong, or a rank is missing.
    """
    rank, size, _ = environment()
    if size == 1:
        yield ALONE
        return
    # gloo, also beside GPUs: only answers travel, as objects of Python.
    join("gloo", rank, size, JOIN_SECONDS)
    try:
        yield Share(rank, size, gather_objects)
    finally:
        leave()


def gather_objects(part: Any) -> list[Any]:
    """The objects of all ranks, in their order."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def device_of_rank(device: str) -> str:
    """The device of this rank: one GPU for each rank of a host."""
    _, size, local_rank = environment()
    if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return device
