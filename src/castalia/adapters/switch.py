"""`disabled`: a model as if it had no adapter, for instance as the reference of a preference."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from castalia.adapters.linear import LoraLinear
from castalia.core.errors import ConfigError

BASE_VALUES = "base_values"
"""Attribute of an adapted model: values that its adapter changes in place, as the base had them."""


def remember(model: nn.Module, names: set[str]) -> None:
    """Keep the base's values of the parameters that an adapter trains in place, which have just
    been filled."""
    values = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name in names
    }
    setattr(model, BASE_VALUES, values)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside the block; FSDP and tensor parallelism may have laid it out.

    Not around a part of a pass: what is recomputed in the backward must see the same model.
    """
    if getattr(model, "prompt", None) is not None:
        raise ConfigError(
            "a soft prompt cannot be switched off: its places stay in the rows; use adapter.kind"
            " lora, dora or bitfit where the base is the reference"
        )
    modules = [module for module in model.modules() if isinstance(module, LoraLinear)]
    with ExitStack() as ending:
        for module in modules:
            module.active = False
        values: dict[str, Tensor] = getattr(model, BASE_VALUES, {})
        if values:
            ending.enter_context(exchanged(model, values))
        try:
            yield
        finally:
            for module in modules:
                module.active = True


@contextmanager
def exchanged(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Parameters with other values inside the block."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].detach().clone() for name in values}
    try:
        fill(parameters, values)
        yield
    finally:
        fill(parameters, own)


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy values into parameters, by name."""
    for name, value in values.items():
        parameters[name].copy_(value)
