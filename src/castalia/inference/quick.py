"""A float32 decoder whose products run in the faster of torch's two libraries on this CPU.

torch computes products of float32 with MKL, which is slow on some processors: on an AMD EPYC 9004
oneDNN takes a fifth to a third less time. The weights are those of the model itself.
"""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from castalia.inference.engine import ScoringModel
from castalia.models import Decoder
from castalia.native.kernels import has_onednn, onednn_product
from castalia.native.tuning import fastest

LEAST_WEIGHTS = 1 << 18
"""Weights of the largest layer below which the choice is not worth measuring."""
ROWS = (128, 512)
"""Rows at which the libraries are compared: a part of the head, and a small batch."""
SECONDS = 0.2
"""Time of the comparison, whose result is stored."""


class QuickLinear(nn.Module):
    """A linear layer computed by oneDNN, (..., K) float32 -> (..., N)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return onednn_product(x, self.weight, self.bias)


def scoring_model(model: Decoder) -> ScoringModel:
    """The decoder with the products that are the fastest here, for inference alone."""
    dtype = model.head_weight.dtype
    shape = largest_layer(model)
    if shape is None or fastest(shape, "fp32", ("fp32", "fp32_onednn"), SECONDS, ROWS) == "fp32":
        return ScoringModel(model, dtype, model.head)
    return quick_model(model)


def largest_layer(model: Decoder) -> tuple[int, int] | None:
    """Shape of the largest linear layer of a block; None if only MKL can compute this model."""
    plain = all(
        type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.is_cpu
        for weight in model.parameters()
    )
    if not plain or not has_onednn():
        return None
    shapes = [
        (layer.out_features, layer.in_features)
        for layer in model.layers.modules()
        if type(layer) is nn.Linear
    ]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0))
    return None if largest[0] * largest[1] < LEAST_WEIGHTS else largest


def quick_model(model: Decoder) -> ScoringModel:
    """The decoder under new modules, whose linear layers are oneDNN's; the weights are shared."""
    kept = [*model.parameters(), model.config, model.family]
    for module in model.modules():
        # Hooks see the passes of both, such as that of an evaluation which may be told to stop.
        kept += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    quick = deepcopy(model, {id(one): one for one in kept})
    for name, layer in list(quick.named_modules()):
        if type(layer) is nn.Linear:
            quick.set_submodule(name, QuickLinear(layer))
    head = partial(onednn_product, weight=model.head_weight, bias=None)
    return ScoringModel(quick, torch.float32, head)
