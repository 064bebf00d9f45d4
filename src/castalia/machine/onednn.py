"""Products by oneDNN, which torch brings beside MKL: of float32 with gradients, and of bytes.

torch gives float32 products to MKL on x86. oneDNN is faster on some processors, also for the two
products of a backward pass, but is slow where the matrix that it reads by rows is a transposed
view. Such a matrix is copied first; of the two factors of a weight's gradient the smaller one is.

Shapes: M rows, K inputs, N outputs of a layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x (M, K), weight (N, K), bias (N,) or None -> (M, N)."""


def has_onednn() -> bool:
    """Whether torch has oneDNN's product for plain weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) by weight (N, K) of the same dtype, plus bias -> (..., N), computed by oneDNN."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        # A column slice, or one number expanded: such views are left to a reference kernel, which
        # takes hundreds of times as long.
        weight = weight.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (M, N) by weight (N, K) -> (M, K), computed by oneDNN."""
    return onednn_product(dy, weight.t(), None)


def weight_gradient(dy: Tensor, x: Tensor, product: Product) -> Tensor:
    """dy^T x of dy (M, N) and x (M, K) -> (N, K), computed by oneDNN; may be a transposed view."""
    if dy.shape[1] <= x.shape[1]:
        return product(dy.t().contiguous(), x.t(), None)
    # The transpose of the gradient, which needs a copy of x in place of the larger dy.
    return product(x.t().contiguous(), dy.t(), None).t()


class ByteLayer(NamedTuple):
    """Weights of N outputs and K inputs in int8."""

    weight: Any
    """(N, K) as oneDNN orders it."""
    scale: Tensor
    """(N,) float32, the size of a step of each output."""
    zeros: Tensor
    """(N,) int64: steps are counted from 0."""
    bias: Tensor | None
    """(N,) float32."""


def byte_layer(q: Tensor, scale: Tensor, bias: Tensor | None) -> ByteLayer:
    """The layer of weights q * scale; q (N, K) int8, scale and bias (N,)."""
    zeros = torch.zeros(len(q), dtype=torch.int64, device="cpu")
    return ByteLayer(torch.ops.onednn.qlinear_prepack(q, None), scale, zeros, bias)


def byte_product(x: Tensor, layer: ByteLayer) -> Tensor:
    """x (M, K) float32, rounded to bytes with one scale for all rows, by a layer -> (M, N)."""
    steps = byte_steps()
    # Signed activations would select oneDNN's reference kernel, hundreds of times slower.
    low = min(x.min().item(), 0.0)
    high = max(x.max().item(), 0.0)
    step = (high - low) / steps or 1.0
    zero = round(-low / step)
    q = (x / step + zero).round_().clamp_(0, steps).to(torch.uint8)
    return multiplied(q, step, zero, layer)


def multiplied(q: Tensor, step: float, zero: int, layer: ByteLayer) -> Tensor:
    """Activations (q - zero) * step, q (M, K) uint8, by a layer -> (M, N) float32."""
    after: tuple[Any, ...] = (layer.bias, 1.0, 0, torch.float32, "none", [], "")
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, step, zero, layer.weight, layer.scale, layer.zeros, *after
    )
    return y


@functools.cache
def byte_steps() -> int:
    """The largest activation that oneDNN sums without an error of its own: 255, or 127 before VNNI.

    There it sums two products of bytes in 16 bits, which 255 * 127 overflows and 127 * 127 does
    not. torch.ao quantizes activations for such processors to 7 bits as well.
    """
    inputs = 512
    weights = torch.full((64, inputs), 127, dtype=torch.int8, device="cpu")
    layer = byte_layer(weights, torch.ones(64, dtype=torch.float32, device="cpu"), None)
    # One row may have a kernel of its own.
    for rows in (1, 32):
        largest = torch.full((rows, inputs), 255, dtype=torch.uint8, device="cpu")
        if (multiplied(largest, 1.0, 0, layer) != 255 * 127 * inputs).any():
            return 127
    return 255
