"""Linear layers whose frozen weight is stored in int8 or int4, under an adapter that trains.

The weight is turned back into floating point where it multiplies, some rows at a time, in the
forward and again in the backward pass; it needs no gradient. Rounded as the native engine stores
it, see castalia.models.quantizing.
Source  Dettmers et al. 2023, arXiv:2305.14314 (QLoRA), with int4 in place of its NF4.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from castalia.adapters.fp8 import linears_of
from castalia.core.errors import ConfigError
from castalia.models import Decoder, ModelConfig
from castalia.models.quantizing import GROUP, quantize_channels, quantize_groups

Quantized = Literal["int8", "int4"]
AT_ONCE = {"cpu": 1 << 21}
"""Numbers of a weight that are floating point at the same time, by device: on a CPU as many as its
caches hold."""
AT_ONCE_DEVICE = 1 << 26
"""The same on a GPU: enough for products at full speed."""

Start = Callable[[str, Sequence[int]], Any]
"""(name, shape of the whole parameter) -> its start value, of which any slice can be read."""


class QuantizedLinear(nn.Linear):
    """y = x W^T + b with a frozen W in integers.

    `weight` holds the integers: (O, I) int8, or for int4 (O, I / 2) uint8, of which byte j has
    input 2 j in its low half and input 2 j + 1 in its high half. `weight_scale` is (O,)
    float32 for int8 and (O, I / 32) bfloat16 for int4.
    """

    weight_scale: nn.Parameter
    kind: Quantized

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of x, or under autocast in its own."""
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        apply: Callable[..., Tensor] = QuantizedProduct.apply
        y = apply(x.to(dtype), self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias.to(dtype)

    def dense_weight(self) -> Tensor:
        """The matrix (O, I) that the integers stand for, float32."""
        return dense_rows(self.weight, self.weight_scale, torch.float32)

    def extra_repr(self) -> str:
        """With the storage."""
        return f"{super().extra_repr()}, {self.kind}"


class QuantizedProduct(torch.autograd.Function):
    """x W^T, with the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Shapes  x (..., I) -> (..., O)."""
        ctx.save_for_backward(weight, scale)
        y = x.new_empty(*x.shape[:-1], len(weight))
        for rows in parts_of(weight):
            y[..., rows] = x @ dense_rows(weight[rows], scale[rows], x.dtype).T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None, None]:
        """Shapes  d_y (..., O) -> (..., I)."""
        weight, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        parts = list(parts_of(weight))
        if len(parts) == 1:
            return d_y @ dense_rows(weight, scale, d_y.dtype), None, None
        # In fp32: the products of many parts add up here.
        total = d_y.new_zeros(*d_y.shape[:-1], inputs_of(weight), dtype=torch.float32)
        for rows in parts:
            total += d_y[..., rows] @ dense_rows(weight[rows], scale[rows], d_y.dtype)
        return total.to(d_y.dtype), None, None


def inputs_of(weight: Tensor) -> int:
    """I of a quantized weight; int4 has two in a byte."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def parts_of(weight: Tensor) -> Iterator[slice]:
    """Rows of a quantized weight that are turned into floating point together."""
    step = max(1, AT_ONCE.get(weight.device.type, AT_ONCE_DEVICE) // inputs_of(weight))
    for begin in range(0, len(weight), step):
        yield slice(begin, min(begin + step, len(weight)))


def dense_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a quantized weight in floating point, (N, I)."""
    if weight.dtype == torch.int8:
        return (weight.float() * scale[:, None]).to(dtype)
    halves = torch.stack((weight & 15, weight >> 4), -1).to(torch.int8) - 8
    grouped = halves.view(len(weight), -1, GROUP).float() * scale.float()[..., None]
    return grouped.flatten(1).to(dtype)


def quantize_rows(weight: Tensor, kind: Quantized) -> tuple[Tensor, Tensor]:
    """Integers and scales of W (O, I), as `QuantizedLinear` holds them."""
    if kind == "int8":
        return quantize_channels(weight.float())
    q, scale = quantize_groups(weight.float())
    halves = (q + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return halves[..., 0] | halves[..., 1] << 4, scale


def quantize_base(model: Decoder, kind: Quantized) -> None:
    """Let every linear layer of the blocks keep its weight in integers, in place.

    The model is on the meta device and not laid out yet; `quantized_start` gives it its numbers.
    Raises  ConfigError for int4 if the inputs of a layer are not divisible by its groups.
    """
    for name, linear in linears_of(model):
        quantize_linear(linear, name, kind)


def quantize_linear(linear: nn.Linear, name: str, kind: Quantized) -> None:
    """One layer, whose integers have no values yet."""
    rows = linear.out_features
    inputs = linear.in_features
    device = linear.weight.device
    if kind == "int4" and inputs % GROUP:
        raise ConfigError(
            f"adapter.base=int4 has one scale for {GROUP} inputs, and {name} has {inputs}; use"
            " adapter.base=int8, which has one a row"
        )
    if kind == "int8":
        weight = torch.empty(rows, inputs, dtype=torch.int8, device=device)
        scale = torch.empty(rows, dtype=torch.float32, device=device)
    else:
        weight = torch.empty(rows, inputs // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(rows, inputs // GROUP, dtype=torch.bfloat16, device=device)
    linear.__class__ = QuantizedLinear
    layer = cast(QuantizedLinear, linear)
    layer.kind = kind
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)


def quantized_start(config: ModelConfig, kind: Quantized, start: Start) -> Start:
    """Start values of a model with quantized layers, each quantized as it is read: one layer at a
    time is whole in floating point."""
    shapes = quantized_weights(config)
    # Integers and scales of one layer, which are made together and asked for one after the other.
    made: dict[str, Tensor] = {}

    def value(name: str, shape: Sequence[int]) -> Any:
        place, _, part = name.rpartition(".")
        weight = f"{place}.weight"
        if weight not in shapes or part not in ("weight", "weight_scale", "magnitude"):
            return start(name, shape)
        if name in made:
            return made.pop(name)
        rows, inputs = shapes[weight]
        dense = start(weight, (rows, inputs))[slice(0, rows), slice(0, inputs)]
        integers, scale = quantize_rows(dense, kind)
        if part == "magnitude":
            # Of the matrix that the integers stand for, so that the model begins as its base.
            return dense_rows(integers, scale, torch.float32).square().sum(1).sqrt()
        made.clear()
        made.update({weight: integers, f"{place}.weight_scale": scale})
        return made.pop(name)

    return value


def quantized_weights(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the weights that `quantize_base` quantizes."""
    with torch.device("meta"):
        return {
            f"{name}.weight": (linear.out_features, linear.in_features)
            for name, linear in linears_of(Decoder(config))
        }


class Rounded:
    """A stored matrix as its integers stand for it, in float32; a part is rounded as it is read."""

    dtype = torch.float32

    def __init__(self, stored: Any, kind: Quantized) -> None:
        """`stored` is any tensor of which slices can be read."""
        self.stored = stored
        self.kind = kind

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return tuple(self.stored.shape)

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        rows, columns = part
        # A scale is of a whole row, or of a group of its inputs.
        whole = self.stored[rows, slice(0, self.shape[1])]
        return dense_rows(*quantize_rows(whole, self.kind), torch.float32)[:, columns]
