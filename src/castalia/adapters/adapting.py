"""`adapt`: an adapter enters a model."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from castalia.adapters.config import AdapterConfig, adapter_of, trained_patterns
from castalia.adapters.quantized import quantize_base, quantized_start
from castalia.models import Decoder, ModelConfig

Sliceable = Any
"""A whole parameter of which any slice can be read."""
Start = Callable[[str, Sequence[int]], Sliceable]
"""(name, shape of the whole parameter) -> its start value."""


def adapt(model: Decoder, config: AdapterConfig) -> Decoder:
    """The model with its adapter, changed in place and returned.

    The model, or the stage of a pipeline, is on the meta device and not laid out yet. Weights and
    biases of the base keep their names. What trains is decided by names: see `Adapter.own`.
    Raises  ConfigError if a target matches no layer.
    """
    if config.base in ("int8", "int4"):
        # Before the adapter, whose layers keep the product of the layers that they are made of.
        quantize_base(model, config.base)
    adapter_of(config).adapt(model, config)
    if config.base == "bf16":
        own = trained_patterns(config, model.config)
        for name, parameter in model.named_parameters():
            if not any(fnmatchcase(name, pattern) for pattern in own):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def start_over(base: Start, config: AdapterConfig, model: ModelConfig, seed: int) -> Start:
    """Start values of an adapted model: those of the adapter over those of its base."""
    start = adapter_start(base, config, seed)
    if config.base in ("int8", "int4"):
        return quantized_start(model, config.base, start)
    return start


def adapter_start(base: Start, config: AdapterConfig, seed: int) -> Start:
    """Start values of the adapter over those of a base in floating point."""
    member = adapter_of(config)
    shapes: dict[str, Sequence[int]] = {}

    def value(name: str, shape: Sequence[int]) -> Sliceable:
        own = member.start(config, name, shape, seed, whole)
        if own is not None:
            return own
        shapes[name] = tuple(shape)
        return base(name, shape)

    def whole(name: str) -> Tensor:
        # Weights come before what is added to them, in the order of the parameters.
        shape = shapes[name]
        out: Tensor = base(name, shape)[tuple(slice(0, size) for size in shape)]
        return out.float()

    return value
