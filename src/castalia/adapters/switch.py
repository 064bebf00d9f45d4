"""`disabled`: a model as if it had no adapter, for instance as the reference of a preference."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from castalia.adapters.linear import LoraLinear


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside the block; FSDP and tensor parallelism may have laid it out."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
