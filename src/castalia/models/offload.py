"""Activations wait for the backward pass in the CPU's memory, where a GPU has too little."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALLEST = 1 << 20
"""Bytes from which a tensor is worth a copy over the bus."""


class Away(NamedTuple):
    """A tensor in the CPU's memory."""

    copy: Tensor
    device: torch.device


class Offload:
    """Copies what autograd keeps to the CPU while the forward pass goes on, and back when the
    backward pass asks for it.

    Under recompute that is each block's input; without it, all that the blocks keep. Weights stay,
    and so do their low-precision copies: what has a weight's shape is taken to be one.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        shapes = {tuple(parameter.shape) for parameter in model.parameters()}
        self.weights = shapes | {shape[::-1] for shape in shapes}
        self.pinned = device.type == "cuda"
        # Of its own, so that the copies run beside the passes.
        self.stream = torch.cuda.Stream(device) if self.pinned else None

    @contextmanager
    def around(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """A forward pass inside `context` whose activations are offloaded."""
        with context, torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def goes(self, tensor: Tensor) -> bool:
        """Whether a tensor that autograd keeps is offloaded."""
        if tensor.nbytes < SMALLEST or tuple(tensor.shape) in self.weights:
            return False
        # Compiled backward passes want the strides that they saw.
        return tensor.is_floating_point() and torch.ops.aten.is_non_overlapping_and_dense(tensor)

    def pack(self, tensor: Tensor) -> Tensor | Away:
        """What autograd keeps in place of `tensor`."""
        if type(tensor) is not Tensor or not self.goes(tensor):
            return tensor
        # Pinned memory, which a GPU reads and writes without the CPU.
        copy = torch.empty_like(tensor, device="cpu", pin_memory=self.pinned)
        if self.stream is None:
            copy.copy_(tensor)
            return Away(copy, tensor.device)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            copy.copy_(tensor, non_blocking=True)
        # Its memory is given to no other tensor before the copy is done.
        tensor.record_stream(self.stream)
        return Away(copy, tensor.device)

    def unpack(self, kept: Tensor | Away) -> Tensor:
        """The tensor again, for the backward pass."""
        if not isinstance(kept, Away):
            return kept
        if self.stream is not None:
            torch.cuda.current_stream(kept.device).wait_stream(self.stream)
        return kept.copy.to(kept.device, non_blocking=True)
