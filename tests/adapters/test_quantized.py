"""Linear layers over a frozen base of integers, against the dense matrices they stand for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import castalia
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
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World, initialize
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, build_model_config
from castalia.models.init import start_weights
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Save
from castalia.train.trainer import Trainer

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
    initialize(model, quantized_start(config, kind, start_weights(config, 0)))
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
    layer.weight_scale.copy_(scale)
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
    held = sum(t.nbytes for layer in layers for t in (layer.weight, layer.weight_scale))
    count = 2 * 12 * 64 * 64
    # The rows of mlp.down are four times as long.
    assert held == pytest.approx(BYTES[kind] * count, rel=0.03)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.qkv has 48; use adapter\.base=int8"):
        model_of("int4", hidden_size=48, num_attention_heads=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Run of a small model; a folder to train in, and a way to train there."""
    folder = tmp_path_factory.mktemp("base")
    random = np.random.default_rng(0)
    words = [random.integers(97, 123, 5) for _ in range(20)]
    for name, chosen in (("text", words), ("other", words[::-1])):
        with IndexedDatasetWriter(folder / name, "uint16") as writer:
            for _ in range(40):
                # The other text has the same words in a fixed order, which an adapter can learn.
                order = random.integers(0, 20, 20) if name == "text" else range(20)
                writer.add(np.concatenate([chosen[n] for n in order]))

    def run(name, *overrides):
        small = ("model.num_layers=2", "model.hidden_size=64", "data.seq_length=32")
        config = load_config(
            ["debug", *small, "train.batch_size=8", f"output={folder / name}", *overrides]
        )
        keep = Keep()
        trainer = Trainer(config, World(0, 1, torch.device("cpu")), hooks=[keep, Save()])
        trainer.fit()
        return keep.losses, trainer

    run("model", f"data.train={folder / 'text'}", "train.steps=30")
    return folder, run


class Keep(Hook):
    """Collects the loss of each step."""

    def __init__(self):
        self.losses = []

    def after_step(self, step):
        self.losses.append(step.metrics["loss"])


@pytest.mark.parametrize(("kind", "base_kind"), [("dora", "int8"), ("lora", "int4")])
def test_an_adapter_learns_over_integers_and_is_merged_into_what_they_stand_for(
    base, kind, base_kind
):
    folder, run = base
    options = (f"data.train={folder / 'other'}", "train.steps=30", "optim.lr=1e-2")
    options += (f"model.start={folder / 'model'}", f"adapter.kind={kind}")
    plain, _ = run(f"{kind}-fp32", *options)
    losses, trainer = run(f"{kind}-{base_kind}", *options, f"adapter.base={base_kind}")
    assert losses[0] == pytest.approx(plain[0], rel=0.02)
    assert plain[-1] < plain[0] - 0.5 and losses[-1] == pytest.approx(plain[-1], rel=0.1)
    saved = open_model(folder / f"{kind}-{base_kind}")
    assert f"a base in {base_kind}" in saved.notes[0]
    model = trainer.model.eval()
    tokens = torch.arange(97, 113)
    with torch.no_grad():
        live = model.head(model(tokens[None]))[0]
    merged = castalia.load(str(folder / f"{kind}-{base_kind}")).logits(tokens.tolist())
    torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)


def test_what_a_base_cannot_be_is_refused():
    for words, message in (
        (["adapter.base=int8"], "is for frozen weights"),
        (["adapter.kind=lora", "adapter.base=bf16"], "needs products in bf16"),
        (["adapter.kind=lora", "adapter.base=int4", "parallel.tp=2"], "set parallel.tp=1"),
        (["adapter.kind=lora", "adapter.base=int4", "precision=fp8"], "would round again"),
        (["adapter.kind=dora", "train.compile=true", "parallel.tp=2"], "dora does not compile"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(["debug", "model.start=somewhere", *words])
