"""The part of a save that stalls training: checking tensors and copying them to CPU memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.checkpoint.shards import NAMES
from castalia.core.errors import CheckpointError
from castalia.distributed.boxes import Box, local_boxes, stands_for_copies


@dataclass(frozen=True)
class Staged:
    """This rank's share of one tensor: (box in the whole, contiguous CPU tensor), maybe none."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[Box, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(tensor.nbytes for _, tensor in self.pieces)


Buffers = dict[str, Tensor]
"""CPU memory for the copies, by tensor and part. It is kept from save to save: page faults of fresh
memory cost several times the copy itself, while training waits."""


def stage(tensors: Mapping[str, Tensor], rank: int, buffers: Buffers | None) -> dict[str, Staged]:
    """Copies of this rank's share of the tensors, in `buffers`.

    Without buffers, CPU tensors are used as they are: the caller waits for the save and may not
    change them meanwhile.
    Raises  CheckpointError for a name without a group (`model.`, `optim.`) or an unknown dtype.
    """
    require_names(tensors)
    with torch.no_grad():
        staged = {name: stage_one(name, tensors[name], rank, buffers) for name in sorted(tensors)}
    if any(tensor.is_cuda for tensor in tensors.values()):
        # The copies to page-locked memory were only queued.
        torch.cuda.synchronize()
    return staged


def require_names(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that could not be loaded again."""
    for name, tensor in tensors.items():
        group = name.partition(".")[0]
        if not group.isidentifier() or group == name:
            raise CheckpointError(
                f"cannot save a tensor named {name!r}: names begin with a group,"
                f" for instance 'model.{name}'"
            )
        if tensor.dtype not in NAMES:
            raise CheckpointError(
                f"cannot save {name}: unknown dtype {tensor.dtype};"
                f" choose one of {', '.join(NAMES.values())}"
            )
        if tensor.is_meta:
            raise CheckpointError(f"cannot save {name}: it is on the meta device and has no values")


def stage_one(name: str, tensor: Tensor, rank: int, buffers: Buffers | None) -> Staged:
    """This rank's share of one tensor; empty if another rank writes it or this one holds
    nothing."""
    pieces = []
    if stands_for_copies(tensor, rank):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        for number, (box, place) in enumerate(local_boxes(tensor)):
            if not box.volume:
                continue
            part = local[place.slices]
            if buffers is None:
                copy = on_cpu(part)
            else:
                copy = copied(part, f"{name}#{number}", buffers)
            pieces.append((box, copy))
    return Staged(tuple(tensor.shape), NAMES[tensor.dtype], pieces)


def on_cpu(tensor: Tensor) -> Tensor:
    """The values as a contiguous CPU tensor, copied only if they must be."""
    return tensor.cpu().contiguous()


def copied(tensor: Tensor, key: str, buffers: Buffers) -> Tensor:
    """A contiguous CPU copy in the buffer of that key; from a GPU, synchronize before reading
    it."""
    buffer = buffers.get(key)
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        # Page-locked memory lets the GPU copy asynchronously and at full bandwidth.
        buffer = buffers[key] = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
        )
    return buffer.copy_(tensor, non_blocking=True)


def require_json(value: Any, where: str = "state") -> None:
    """Refuse a state that JSON would not return unchanged.

    Raises  CheckpointError naming the place, for instance state.mixer.weights.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"cannot save {where}: its key {key!r} is not text; JSON would change it"
                )
            require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            require_json(item, f"{where}[{number}]")
    elif value is not None and not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise CheckpointError(
            f"cannot save {where}: a {kind} is not JSON; make it a list, a number or text"
        )
