"""Linear layers by oneDNN: their numbers, their gradients, and where torch computes instead."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from castalia.adapters.linear import adapt_linear
from castalia.adapters.lora import LoraConfig
from castalia.losses.cross_entropy import fused_cross_entropy
from castalia.machine import onednn
from castalia.models.recompute import recomputed
from castalia.products import (
    ONEDNN,
    TORCH,
    WIDE,
    OnednnLinear,
    head_products,
    linear,
    use_onednn,
)

pytestmark = pytest.mark.skipif(not onednn.has_onednn(), reason="torch comes without oneDNN")
SHAPES = [(48, 32, 96), (48, 96, 32), (5, 30, 7), (1, 16, 16)]
"""M rows, K inputs, N outputs: wide, narrow, odd, and one row."""


@pytest.fixture(autouse=True)
def no_least(monkeypatch):
    """Products of any size."""
    monkeypatch.setattr(linear, "LEAST", 0)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the factors of oneDNN's products, in the order of their calls."""
    seen = []
    real = onednn.onednn_product

    def product(x, weight, bias):
        seen.append((*x.shape, weight.shape[0]))
        return real(x, weight, bias)

    monkeypatch.setattr(onednn, "onednn_product", product)
    return seen


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(K, N, bias=True):
    """A layer by oneDNN with numbers of its own."""
    layer = nn.Linear(K, N, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(numbers(N, K, seed=1) / K**0.5)
        if bias:
            layer.bias.copy_(numbers(N, seed=2))
    layer.__class__ = OnednnLinear
    return layer


def error(found, exact):
    exact = exact.detach()
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_float64(M, K, N, bias, calls):
    layer = layer_of(K, N, bias)
    x = numbers(M, K).requires_grad_()
    exact = nn.Linear(K, N, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    dy = numbers(M, N, seed=3)
    for model, inputs, d in ((layer, x, dy), (exact, wide, dy.double())):
        model(inputs.view(1, M, K)).backward(d.view(1, M, N))
    backward = (N, M, K) if N <= K else (K, M, N)
    assert calls == [(M, K, N), (M, N, K), backward]
    assert error(layer(x), exact(wide)) < 1e-6 and error(x.grad, wide.grad) < 1e-6
    for name, parameter in layer.named_parameters():
        assert parameter.grad.is_contiguous()
        assert error(parameter.grad, exact.get_parameter(name).grad) < 1e-6


def test_gradients_of_gradients():
    layer = layer_of(24, 40)
    exact = nn.Linear(24, 40).double()
    exact.load_state_dict(layer.state_dict())
    found = []
    for model in (layer, exact):
        x = numbers(16, 24).to(model.weight.dtype).requires_grad_()
        first = torch.autograd.grad(
            model(x).pow(3).sum(), (x, model.weight), create_graph=True, retain_graph=True
        )
        second = sum(d.square().sum() for d in first)
        found.append(torch.autograd.grad(second, (x, model.weight)))
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < 1e-5


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_the_operator_keeps_its_contract():
    """Schema, autograd, and shapes and strides without numbers."""
    x, weight, bias, dy = numbers(12, 20), numbers(28, 20), numbers(28), numbers(12, 28)
    for arguments in ((x, weight, bias), (dy, weight.t(), None), (dy.t(), x.t(), None)):
        given = [a if a is None else a.detach().requires_grad_() for a in arguments]
        torch.library.opcheck(linear.onednn_linear, given, test_utils=CHECKS)


def test_compiled_is_eager_and_repeats():
    """Bit for bit, forward and backward."""
    layers = nn.Sequential(layer_of(32, 64), nn.ReLU(), layer_of(64, 32))
    compiled = torch.compile(layers)
    found = []
    for model in (layers, compiled, layers):
        x = numbers(2, 16, 32).requires_grad_()
        y = model(x)
        gradients = torch.autograd.grad(y.square().sum(), (x, *layers.parameters()))
        # Sums of biases and of squares are loops of another order when compiled.
        found.append([y, *(g for g in gradients if g.ndim > 1)])
    for eager, other, again in zip(*found, strict=True):
        assert torch.equal(eager, again) and torch.equal(eager, other)


def test_what_torch_computes(calls, monkeypatch):
    layer = layer_of(16, 24)
    x = numbers(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32 and calls.pop() == (8, 16, 24)
    assert layer_of(16, 24).double()(x.double()).dtype == torch.float64
    assert layer_of(16, 24).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta")(x.to("meta")).device.type == "meta"
    monkeypatch.setattr(linear, "LEAST", 8 * 16 * 24 + 1)
    layer = layer_of(16, 24)
    y = layer(x)
    assert calls == [] and torch.equal(y, F.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr(linear, "LEAST", 8 * 16 * 24)
    layer(x)
    assert calls == [(8, 16, 24)]
    cpu = torch.device("cpu")
    large = (512, 512, 50304)
    assert head_products(True, torch.float32, cpu, large) is WIDE
    assert head_products(True, torch.float32, cpu, (512, 256, 50304)) is ONEDNN
    assert head_products(False, torch.float32, cpu, large) is TORCH
    assert head_products(True, torch.bfloat16, cpu, large) is TORCH
    assert head_products(True, torch.float32, torch.device("cuda"), large) is TORCH


def test_a_frozen_weight_has_no_gradient_computed(calls):
    layer = layer_of(16, 24).requires_grad_(False)
    x = numbers(8, 16).requires_grad_()
    layer(x).sum().backward()
    assert calls == [(8, 16, 24), (8, 24, 16)]
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_selective_recompute_keeps_wide_products(calls):
    up, down = layer_of(16, 64), layer_of(64, 16)
    x = numbers(4, 8, 16).requires_grad_()
    recomputed("selective", 64, lambda h: down(up(h).relu()), x).sum().backward()
    # The narrow product is made again, the wide one is kept.
    assert calls[:3] == [(32, 16, 64), (32, 64, 16), (32, 64, 16)] and len(calls) == 7
    calls.clear()
    recomputed("full", 64, lambda h: down(up(h).relu()).square(), x).sum().backward()
    assert calls[:4] == [(32, 16, 64), (32, 64, 16)] * 2 and len(calls) == 8


class Model(nn.Module):
    """Layers, and a head that is not one of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24))])
        self.unembed = nn.Linear(16, 24)


def test_the_layers_of_a_model(calls):
    model = Model()
    names = list(model.state_dict())
    use_onednn(model)
    assert type(model.layers[0][0]) is OnednnLinear and type(model.unembed) is nn.Linear
    assert model.onednn and list(model.state_dict()) == names
    layer = model.layers[0][0]
    # An adapter keeps the product of what it is made of.
    adapt_linear(layer, "layers.0.0", LoraConfig(rank=2), magnitude=False)
    nn.init.ones_(layer.lora_a)
    nn.init.zeros_(layer.lora_b)
    x = numbers(3, 5, 16)
    y = layer(x)
    assert calls == [(15, 16, 24)]
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_head(weighted, calls):
    N, C, V = 50, 24, 300
    hidden = numbers(N, C).requires_grad_()
    weight = numbers(V, C, seed=1).requires_grad_()
    labels = torch.arange(N) * 5
    labels[3] = -100
    weights = torch.linspace(0.1, 2, N) if weighted else None
    options = {"weights": weights, "chunk_rows": 16}
    total, rows = fused_cross_entropy(hidden, weight, labels, onednn=True, **options)
    total.backward()
    assert len(calls) == 12 and {call[0] for call in calls} == {11, 13, C}
    wide = [p.detach().double().requires_grad_() for p in (hidden, weight)]
    exact = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="none")
    (exact if weights is None else exact * weights).sum().backward()
    assert error(rows, exact) < 1e-6
    assert error(hidden.grad, wide[0].grad) < 1e-6 and error(weight.grad, wide[1].grad) < 1e-6
    calls.clear()
    with torch.no_grad():
        again = fused_cross_entropy(hidden, weight, labels, onednn=True, chunk_rows=16).rows
    assert torch.equal(again, rows) and [call[1:] for call in calls] == [(C, V)] * 4
    with torch.autocast("cpu", torch.bfloat16):
        fused_cross_entropy(hidden, weight, labels, onednn=True).total.backward()
    assert len(calls) == 4
