"""precision=fp8: which layers, their arithmetic, what is refused; and a whole training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from castalia.adapters.fp8 import Fp8Config, emulated, require_fp8, to_fp8
from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.models import Decoder, build_model_config
from castalia.recipes import load_config
from castalia.train.hooks import Hook
from castalia.train.machine_precision import precision_notes
from castalia.train.trainer import Trainer

CPU = torch.device("cpu")
SMALL = {
    "family": "neox",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


def small(**changes):
    return Decoder(build_model_config(SMALL | changes, "test"))


def rounded(x, dtype):
    """x as fp8 stands for it with one scale, in float32."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x.double() * scale).float().to(dtype).float() / scale.float()


def test_only_the_products_of_blocks_change_and_no_parameter_does():
    model = small()
    before = dict(model.named_parameters())
    to_fp8(model, Fp8Config(skip=["layers.1.*"]), CPU)
    assert {id(p) for p in before.values()} == {id(p) for p in model.parameters()}
    assert list(before) == [name for name, _ in model.named_parameters()]
    changed = [n for n, m in model.named_modules() if "Float8" in type(m).__name__]
    assert changed == [
        f"layers.0.{place}" for place in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    ]


@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
def test_a_product_is_that_of_the_rounded_factors(gradients):
    torch.manual_seed(0)
    model = small()
    to_fp8(model, Fp8Config(gradients=gradients), CPU)
    layer = model.layers[0].mlp.up
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    # Ten tokens: not a multiple of 16.
    x = torch.randn(10, 32, requires_grad=True)
    given = torch.randn(10, 128).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(given)
    assert y.dtype == torch.bfloat16
    x8 = rounded(x.detach().bfloat16(), torch.float8_e4m3fn)
    w8 = rounded(layer.weight.detach(), torch.float8_e4m3fn)
    formats = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}
    g8 = rounded(given, formats[gradients])
    close = {"rtol": 0.01, "atol": 0.05}
    torch.testing.assert_close(y.float(), F.linear(x8, w8, layer.bias), **close)
    torch.testing.assert_close(x.grad, g8 @ w8, **close)
    torch.testing.assert_close(layer.weight.grad, g8.T @ x8, **close)
    # More than rounding to bf16 alone.
    assert (y.float() - F.linear(x, layer.weight, layer.bias)).abs().max() > 0.1


def test_what_cannot_be_is_refused(monkeypatch):
    odd = small(intermediate_size=40)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up has 32 inputs and 40 outputs"):
        require_fp8(odd, Fp8Config(), CPU)
    require_fp8(odd, Fp8Config(skip=["layers.*.mlp.*"]), CPU)
    with pytest.raises(ConfigError, match=r"matches no linear layer of a block.*attn\.qkv"):
        require_fp8(small(), Fp8Config(skip=["layers.*.attn.qvk"]), CPU)
    with pytest.raises(ConfigError, match="a cpu has no products in fp8"):
        emulated(Fp8Config(emulate="never"), CPU)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for found, answer in (((8, 0), None), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, got=found: got)
        if answer is None:
            with pytest.raises(ConfigError, match=r"NVIDIA A100 has 8\.0; use precision=bf16"):
                emulated(Fp8Config(), gpu)
            assert emulated(Fp8Config(emulate="always"), gpu)
        else:
            assert emulated(Fp8Config(), gpu) is answer
    with pytest.raises(ConfigError, match="scaling rowwise has e4m3 alone"):
        load_config(["debug", "precision=fp8", "fp8.scaling=rowwise", "fp8.gradients=e5m2"])
    with pytest.raises(ConfigError, match=r"set parallel\.tp=1, or precision=bf16"):
        load_config(["debug", "precision=fp8", "parallel.tp=2"])


class Keep(Hook):
    """Collects the loss of each step."""

    def __init__(self):
        self.losses = []

    def after_step(self, step):
        self.losses.append(step.metrics["loss"])


@pytest.fixture
def words(tmp_path):
    """Prefix of a token file of words: what comes next is learned in few steps."""
    random = np.random.default_rng(0)
    known = [random.integers(97, 123, size) for size in random.integers(2, 8, 40)]
    with IndexedDatasetWriter(tmp_path / "words", "uint16") as writer:
        for _ in range(100):
            chosen = [known[n] for n in random.integers(0, 40, 60)]
            writer.add(np.concatenate([np.append(word, 32) for word in chosen]))
    return tmp_path / "words"


def test_the_loss_is_within_a_percent_of_bf16_after_200_steps(words, tmp_path):
    """The same rows, from the same weights."""
    ends = {}
    for name in ("bf16", "fp8"):
        config = load_config(
            [
                "debug",
                f"data.train={words}",
                f"output={tmp_path / name}",
                "model.num_layers=1",
                "model.hidden_size=64",
                "data.seq_length=32",
                "train.batch_size=8",
                "model.vocab_size=256",
                "train.steps=200",
                f"precision={name}",
            ]
        )
        keep = Keep()
        Trainer(config, World(0, 1, CPU), hooks=[keep]).fit()
        ends[name] = sum(keep.losses[-20:]) / 20
        assert keep.losses[0] > ends[name] + 1
    print(f"mean loss of steps 181-200: bf16 {ends['bf16']:.4f}, fp8 {ends['fp8']:.4f}")
    assert ends["fp8"] == pytest.approx(ends["bf16"], rel=0.01)
    assert ends["fp8"] != ends["bf16"]
    config = load_config(["debug", f"data.train={words}", "precision=fp8"])
    assert "emulated" in precision_notes(config, config, CPU)[0]
