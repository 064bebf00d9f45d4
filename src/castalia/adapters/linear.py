"""`LoraLinear`: a linear layer with a low-rank addition, for LoRA and DoRA.

Shapes: R rank, I inputs, O outputs of the layer.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from castalia.adapters.config import Whole
from castalia.adapters.dropping import drop_input
from castalia.adapters.lora import LoraConfig
from castalia.adapters.targets import is_target, names_all, part_of
from castalia.core.errors import ConfigError
from castalia.models import Decoder
from castalia.models.families import family_of
from castalia.models.init import parameter_seed
from castalia.models.parts.dropout import Draws


class LoraLinear(nn.Linear):
    """y = W x + b + scale * B A x, or with a magnitude m its DoRA form.

    An existing layer becomes one in place: it keeps its weight and bias, and its own way to
    multiply with them, which `super().forward` is. A layer that stores its weight otherwise says
    in `dense_weight` what it stands for.
    """

    scale: float
    dropout: float
    draw_place: int
    active: bool
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None
    draws_input = True
    """See castalia.models.parts.dropout.project."""
    split_axes = {
        "weight": ("outputs", "inputs"),
        "bias": ("outputs",),
        "lora_a": ("rank", "inputs"),
        "lora_b": ("outputs", "rank"),
        "magnitude": ("outputs",),
    }
    """What each dim of each parameter is, which tells how tensor parallelism splits it."""

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, T, I) -> (B, T, O); with `draws` the addition's input is dropped by place."""
        base: Tensor = super().forward(x)
        if not self.active:
            return base
        dropped = x
        if draws is not None and self.dropout > 0:
            dropped = drop_input(x, draws, self.draw_place, self.dropout)
        hidden = F.linear(dropped, self.lora_a) * self.scale
        if self.magnitude is not None:
            return self.with_magnitude(base, dropped, x, F.linear(hidden, self.lora_b))
        if isinstance(base, DTensor):
            return base + F.linear(hidden, self.lora_b)
        # One kernel, which adds up where the base's product lies.
        shape = base.shape
        flat = torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), self.lora_b.t())
        return flat.view(shape)

    def with_magnitude(self, base: Tensor, dropped: Tensor, x: Tensor, addition: Tensor) -> Tensor:
        """DoRA's output from those of the base and of the addition."""
        assert self.magnitude is not None
        factor = self.magnitude / self.lengths()
        # In the dtype of the products: the layers after it must not see another one than without.
        more = (factor - 1).to(base.dtype)
        if dropped is x:
            product = base if self.bias is None else base - self.bias.to(base.dtype)
        else:
            product = F.linear(dropped, self.dense_weight())
        return base + more * product + factor.to(base.dtype) * addition

    def dense_weight(self) -> Tensor:
        """The base's matrix (O, I), which a quantized layer makes of its integers."""
        stored = getattr(super(), "dense_weight", None)
        return self.weight if stored is None else stored()

    def lengths(self) -> Tensor:
        """Lengths (O,) of the rows of W + scale * B A, constants in the backward pass."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            addition = self.lora_b.float() @ self.lora_a.float()
            whole = self.dense_weight().float() + self.scale * addition
            return whole.square().sum(1).sqrt()

    def extra_repr(self) -> str:
        """With the rank."""
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}"


FORMS: dict[type[nn.Linear], type[LoraLinear]] = {nn.Linear: LoraLinear}
"""The LoRA form of each class of linear layers that was adapted."""


def lora_class(base: type[nn.Linear]) -> type[LoraLinear]:
    """The LoRA form of a class of linear layers, which keeps its own product."""
    if base not in FORMS:
        FORMS[base] = cast(type[LoraLinear], type(f"Lora{base.__name__}", (LoraLinear, base), {}))
    return FORMS[base]


def add_lora(model: Decoder, config: LoraConfig, *, magnitude: bool) -> None:
    """Give every targeted linear layer of the blocks its addition.

    Raises  ConfigError if no layer is a target, of a model whose blocks do not all declare theirs.
    """
    parts = family_of(model.config).parts(model.config)
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not name.startswith("layers."):
            continue
        names.append(name)
        part = None if parts is None else part_of(name, parts.linears)
        if is_target(name, part.role if part else None, config.targets):
            adapt_linear(module, name, config, magnitude=magnitude)
    if not names_all(model.config) and not any(isinstance(m, LoraLinear) for m in model.modules()):
        raise ConfigError(
            f"adapter.targets {config.targets} match none of {', '.join(names) or 'no layers'};"
            " use all-linear or patterns of these names"
        )


def adapt_linear(linear: nn.Linear, name: str, config: LoraConfig, *, magnitude: bool) -> None:
    """Make one layer a LoRA layer, in place, with parameters that have no values yet."""
    linear.__class__ = lora_class(type(linear))
    layer = cast(LoraLinear, linear)
    layer.scale = config.scale
    layer.dropout = config.dropout
    layer.active = True
    # By its place in the block: the draws that it gets are those of its layer.
    place = name.split(".", 2)[-1]
    layer.draw_place = int.from_bytes(hashlib.sha256(place.encode()).digest()[:3], "big") + 16
    options: dict[str, Any] = {"device": layer.weight.device, "dtype": torch.float32}
    layer.lora_a = nn.Parameter(torch.empty(config.rank, layer.in_features, **options))
    layer.lora_b = nn.Parameter(torch.empty(layer.out_features, config.rank, **options))
    layer.magnitude = None
    if magnitude:
        layer.magnitude = nn.Parameter(torch.empty(layer.out_features, **options))


def start_value(name: str, shape: Sequence[int], seed: int, whole: Whole) -> Tensor | None:
    """Start value of an addition's parameter, drawn from (seed, name); None of another one."""
    place, _, kind = name.rpartition(".")
    if kind == "lora_b":
        return torch.zeros(tuple(shape))
    if kind == "magnitude":
        return whole(f"{place}.weight").square().sum(1).sqrt()
    if kind == "lora_a":
        # Kaiming's bound of torch's Linear, sqrt(6 / ((1 + 5) * inputs)), as PEFT has it.
        bound = shape[1] ** -0.5
        generator = torch.Generator().manual_seed(parameter_seed(seed, name))
        return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)
    return None
