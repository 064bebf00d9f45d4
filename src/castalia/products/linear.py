"""Linear layers whose products in float32, forward and backward, oneDNN computes on a CPU.

Three custom operators, each the derivative of the others, so that gradients of gradients exist:

    linear           y = x W^T + b
    input_gradient   dx = dy W
    weight_gradient  dW = dy^T x

torch.compile sees each as one node, eager mode calls the same ones, and a product that is small or
of another kind (dtype, device, autocast, DTensor) is torch's. The choice depends on shapes alone,
never on a measurement at that moment, so that a pass computes the same numbers again.

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
    """dy (M, N), x (M, K) -> dy^T x (N, K)."""


TORCH = Products(
    lambda x, weight: x @ weight.T,
    lambda dy, weight: dy @ weight,
    lambda dy, x: dy.T @ x,
)
ONEDNN = Products(
    lambda x, weight: onednn.onednn_product(x, weight, None),
    onednn.input_gradient,
    onednn.weight_gradient,
)


def fitting(wanted: bool, dtype: torch.dtype, device: torch.device, size: int) -> Products:
    """oneDNN's products if they are wanted and compute this kind, else torch's.

    size  M K N of a product.
    """
    if wanted and dtype == torch.float32 and device.type == "cpu" and size >= LEAST:
        return ONEDNN
    return TORCH


@torch.library.custom_op("castalia::linear", mutates_args=(), device_types="cpu")
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K), weight (N, K), bias (N,) or None -> (M, N)."""
    return onednn.onednn_product(x, weight, bias)


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("castalia::linear_input_gradient", mutates_args=(), device_types="cpu")
def onednn_input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (M, N), weight (N, K) -> (M, K)."""
    return onednn.input_gradient(dy, weight)


@onednn_input_gradient.register_fake
def _(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@torch.library.custom_op("castalia::linear_weight_gradient", mutates_args=(), device_types="cpu")
def onednn_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (M, N), x (M, K) -> (N, K)."""
    return onednn.weight_gradient(dy, x).contiguous()


@onednn_weight_gradient.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1])


def keep_two(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep both factors of a product for its backward pass."""
    ctx.save_for_backward(*inputs[:2])


def backward_of_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, the weight and the bias."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = onednn_input_gradient(dy, weight) if needs_x else None
    d_weight = onednn_weight_gradient(dy, x) if needs_weight else None
    return dx, d_weight, dy.sum(0) if needs_bias else None


def backward_of_input_gradient(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of dy and the weight, d (M, K) being that of dx = dy W."""
    dy, weight = ctx.saved_tensors
    needs_dy, needs_weight = ctx.needs_input_grad
    d_dy = onednn_linear(d, weight, None) if needs_dy else None
    return d_dy, onednn_weight_gradient(dy, d) if needs_weight else None


def backward_of_weight_gradient(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of dy and x, d (N, K) being that of dW = dy^T x."""
    dy, x = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad
    d_dy = onednn_linear(x, d, None) if needs_dy else None
    return d_dy, onednn_input_gradient(dy, d) if needs_x else None


onednn_linear.register_autograd(backward_of_linear, setup_context=keep_two)
onednn_input_gradient.register_autograd(backward_of_input_gradient, setup_context=keep_two)
onednn_weight_gradient.register_autograd(backward_of_weight_gradient, setup_context=keep_two)


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
    # Autocast would have cast both. A DTensor is a weight that tensor parallelism has split.
    if torch.is_autocast_enabled(x.device.type) or type(weight) not in (nn.Parameter, Tensor):
        return False
    same = x.dtype == weight.dtype
    return same and fitting(True, x.dtype, x.device, x.numel() * weight.shape[0]) is ONEDNN


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
