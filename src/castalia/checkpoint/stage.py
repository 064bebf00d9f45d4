"""The one moment in which a save stalls training: checking what is to be saved and copying it to CPU memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.checkpoint.boxes import Box, held_boxes, is_first_copy
from castalia.checkpoint.shards import NAMES
from castalia.core.errors import CheckpointError


@dataclass(frozen=True)
class Staged:
    """What this process writes of one tensor: boxes of the whole and a contiguous CPU tensor for each; maybe none."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[Box, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes that this process writes of it."""
        return sum(tensor.nbytes for _, tensor in self.pieces)


def stage(tensors: Mapping[str, Tensor], rank: int, copy: bool) -> dict[str, Staged]:
    """Copies of this process's share of the tensors; with copy=False, CPU memory is used as it is.

    Raises  CheckpointError for a name without a group (`model.`, `optim.`) or a dtype that has no safetensors code.
    """
    require_names(tensors)
    with torch.no_grad():
        staged = {name: stage_one(tensors[name], rank, copy) for name in sorted(tensors)}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()  # the copies below were only queued
    return staged


def require_names(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what could be saved and not found again."""
    for name, tensor in tensors.items():
        group = name.partition(".")[0]
        if not group.isidentifier() or group == name:
            raise CheckpointError(
                f"cannot save a tensor named {name!r}: names begin with a group, as in 'model.{name}'"
            )
        if tensor.dtype not in NAMES:
            raise CheckpointError(
                f"cannot save {name}: dtype {tensor.dtype}; checkpoints hold {', '.join(NAMES.values())}"
            )
        if tensor.is_meta:
            raise CheckpointError(f"cannot save {name}: it is on the meta device and has no values")


def stage_one(tensor: Tensor, rank: int, copy: bool) -> Staged:
    """This process's share of one tensor: nothing, if another process writes it or no element is here."""
    pieces = []
    if is_first_copy(tensor, rank):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        for box, place in held_boxes(tensor):
            if box.volume:
                pieces.append((box, to_cpu(local[place.seen_from((0,) * len(place.offset))], copy)))
    return Staged(tuple(tensor.shape), NAMES[tensor.dtype], pieces)


def to_cpu(tensor: Tensor, copy: bool) -> Tensor:
    """A contiguous CPU copy. From a GPU it goes to page-locked memory and is only queued: synchronize before use."""
    if tensor.is_cuda:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return target.copy_(tensor, non_blocking=True)
    if tensor.device.type != "cpu":
        return tensor.cpu().contiguous()
    return tensor.clone(memory_format=torch.contiguous_format) if copy else tensor.contiguous()


def require_json(value: Any, where: str = "state") -> None:
    """Refuse a state that would come back from JSON as something else.

    Raises  CheckpointError naming the place, for instance state.mixer.weights.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"cannot save {where}: its key {key!r} is not text; JSON would change it")
            require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            require_json(item, f"{where}[{number}]")
    elif value is not None and not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise CheckpointError(f"cannot save {where}: a {kind} is not JSON; make it a list, a number or text")
