"""Products of float32 matrices by oneDNN, which torch brings beside MKL: forward and gradients.

torch gives float32 products to MKL on x86. oneDNN is faster on some processors, also for the two
products of a backward pass, but is slow where the matrix that it reads by rows is a transposed
view. Such a matrix is copied first; of the two factors of a weight's gradient the smaller one is.

Shapes: M rows, K inputs, N outputs of a layer.
"""

from collections.abc import Callable

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
