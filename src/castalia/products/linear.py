"""Linear layers whose products in float32, forward and backward, oneDNN computes on a CPU.

One custom operator, y = x W^T + b, whose derivatives are products by itself, so that gradients of
gradients exist. torch.compile sees it as one node, and the copies of transposed matrices that the
gradient of the weight needs beside it, which it makes faster than eager mode does and together with
what computes them. A product that is small or of another kind (dtype, device, autocast, DTensor) is
torch's. The choice depends on shapes alone, never on a measurement at that moment, so that a pass
computes the same numbers again.

Shapes: M rows, K inputs, N outputs of a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.machine import onednn

LEAST = 1 << 24
"""M K N from which oneDNN computes a product: a smaller one gains less than a call of an operator
written in Python costs, some hundredths of a millisecond."""


class Products(NamedTuple):
    """One library's products of plain matrices, without gradients of their own."""

    linear: Callable[[Tensor, Tensor], Tensor]
    """x (M, K), W (N, K) -> x W^T (M, N)."""
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    """dy (M, N), W (N, K) -> dy W (M, K)."""
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    """dy (M, N), x (M, K) -> dy^T x (N, K), which may be a transposed view."""


TORCH = Products(
    lambda x, weight: x @ weight.T,
    lambda dy, weight: dy @ weight,
    lambda dy, x: dy.T @ x,
)
"""Those of torch, for any dtype and device."""
ONEDNN = Products(
    lambda x, weight: onednn.onednn_product(x, weight, None),
    lambda dy, weight: onednn.input_gradient(dy, weight),
    lambda dy, x: onednn.weight_gradient(dy, x, onednn.onednn_product),
)
"""Those of oneDNN, for float32 on a CPU; a gradient of W is a transposed view where K < N."""


WIDE = ONEDNN._replace(weight_gradient=TORCH.weight_gradient)
"""Those of a head with more than NARROW inputs: there torch's gradient of the weight is as fast,
and needs no transposed sum, which costs a copy as large as the head in the end."""
NARROW = 256


def is_onednn(dtype: torch.dtype, device: torch.device, size: int) -> bool:
    """Whether oneDNN computes a product of this kind with M K N = `size`."""
    return dtype == torch.float32 and device.type == "cpu" and size >= LEAST


def head_products(
    wanted: bool, dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int]
) -> Products:
    """The products of a head of `shape` M, K, N: oneDNN's if they are wanted and fit."""
    M, K, N = shape
    if not wanted or not is_onednn(dtype, device, M * K * N):
        return TORCH
    return ONEDNN if K <= NARROW else WIDE


@torch.library.custom_op("castalia::onednn_linear", mutates_args=(), device_types="cpu")
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K), weight (N, K) or a transposed view, bias (N,) or None -> (M, N)."""
    return onednn.onednn_product(x, weight, bias)


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep both factors of a product for its backward pass."""
    ctx.save_for_backward(*inputs[:2])


def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, the weight and the bias."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = onednn_linear(dy, weight.t(), None) if needs_x else None
    d_weight = None
    if needs_weight:
        d_weight = onednn.weight_gradient(dy, x, onednn_linear).contiguous()
    return dx, d_weight, dy.sum(0) if needs_bias else None


onednn_linear.register_autograd(gradients, setup_context=keep_factors)


class OnednnLinear(nn.Linear):
    """A linear layer that oneDNN computes where it can; an existing layer becomes one in place."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        weight = self.weight
        if not computes(x, weight):
            return F.linear(x, weight, self.bias)
        y = onednn_linear(x.reshape(-1, weight.shape[1]), weight, self.bias)
        return y.view(*x.shape[:-1], weight.shape[0])


def computes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product, of x (..., K) and weight (N, K)."""
    # A DTensor is a weight that tensor parallelism has split.
    plain = type(weight) in (nn.Parameter, Tensor) and x.dtype == weight.dtype
    if not plain or not is_onednn(x.dtype, x.device, x.numel() * weight.shape[0]):
        return False
    # Autocast would cast both.
    return not torch.is_autocast_enabled("cpu")


def use_onednn(model: nn.Module) -> None:
    """Let the plain linear layers of a model's blocks be computed by oneDNN, in place, and its
    head with them; parameters and their names stay."""
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    for layer in layers.modules():
        # Subclasses have products of their own.
        if type(layer) is nn.Linear:
            layer.__class__ = OnednnLinear
    # Read by castalia.losses, which compute the head.
    model.onednn = True  # type: ignore[assignment]
