"""Linear layers over a frozen base of integers, against the dense matrices they stand for."""

import pytest
import torch
import torch.nn.functional as F

from castalia.adapters import quantized
from castalia.adapters.quantized import (
    QuantizedLinear,
    Rounded,
    dense_rows,
    quantize_base,
    quantize_rows,
    quantized_start,
    quantized_weights,
)
from castalia.core.errors import ConfigError
from castalia.distributed import initialize
from castalia.models import Decoder, build_model_config
from castalia.models.init import start_weights

CONFIG = {
    "family": "neox",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
KINDS = ("int8", "int4")
BYTES = {"int8": 1 + 4 / 64, "int4": 0.5 + 2 / 32}
"""A weight's, with its scale, of rows of 64 inputs."""


def model_of(kind, **changes):
    """A model with quantized linear layers, from its start weights."""
    config = build_model_config(CONFIG | changes, "test")
    with torch.device("meta"):
        model = Decoder(config)
    quantize_base(model, kind)
    model.to_empty(device="cpu")
    initialize(model, quantized_start(model, start_weights(config, 0)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dense_matrix(monkeypatch, kind, dtype):
    torch.manual_seed(0)
    # Parts of three rows: the last one is shorter.
    monkeypatch.setitem(quantized.AT_ONCE, "cpu", 3 * 64)
    layer = torch.nn.Linear(64, 40)
    bias = layer.bias.detach().clone()
    weight, scale = quantize_rows(layer.weight.detach(), kind)
    quantized.quantize_linear(layer, "layer", kind)
    layer.weight.copy_(weight)
    layer.scale.copy_(scale)
    dense = layer.dense_weight()
    x = torch.randn(2, 5, 64, requires_grad=True)
    wide = x.detach().clone().requires_grad_()
    given = torch.randn(2, 5, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = layer(x)
        theirs = F.linear(wide, dense, bias)
    assert ours.dtype == theirs.dtype == dtype
    ours.backward(given.to(dtype))
    theirs.backward(given.to(dtype))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(x.grad, wide.grad, **close)
    assert layer.weight.grad is None and layer.bias.grad is not None


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.5 / 127), ("int4", 0.6 / 7)])
def test_rounding_is_within_half_a_step_of_the_largest(kind, most):
    weight = torch.randn(30, 96)
    dense = dense_rows(*quantize_rows(weight, kind), torch.float32)
    limit = weight.abs().amax(1, keepdim=True) * most * 1.2
    assert ((dense - weight).abs() <= limit).all()
    assert (dense - weight).abs().max() > 0
    # Twice is once for int8; the numbers of int4 have another best scale then.
    part = Rounded(weight, kind)[slice(3, 9), slice(10, 20)]
    assert torch.equal(part, dense[3:9, 10:20])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_from_its_weights_and_takes_the_bytes_it_says(kind):
    model = model_of(kind)
    config = model.config
    dense = Decoder(config)
    start = start_weights(config, 0)
    rounded = quantized_weights(config)

    def value(name, shape):
        stored = start(name, shape)
        return Rounded(stored, kind) if name in rounded else stored

    initialize(dense, value)
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == len(rounded) == 8
    held = sum(t.nbytes for layer in layers for t in (layer.weight, layer.scale))
    count = 2 * 12 * 64 * 64
    # The rows of mlp.down are four times as long.
    assert held == pytest.approx(BYTES[kind] * count, rel=0.03)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.qkv has 48; use adapter\.base=int8"):
        model_of("int4", hidden_size=48, num_attention_heads=3)
