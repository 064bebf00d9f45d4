"""Weights at the start against GPT-NeoX's formulas."""

import pytest
import torch

from castalia.distributed import initialize
from castalia.models import Decoder, NeoxConfig, init_parameter
from castalia.models.init import start_weights
from castalia.models.starts import drawn


def config(hidden: int, layers: int, **changes: object) -> NeoxConfig:
    values = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 1,
        "vocab_size": 256,
    }
    return NeoxConfig.model_validate(values | changes)


GOLDEN = [
    (512, 6, 0.0279508, 0.0147314),
    (768, 12, 0.0228218, 0.0060141),
    (1024, 24, 0.0197642, 0.0026042),
    (2048, 16, 0.0139754, 0.0027621),
    (2048, 24, 0.0139754, 0.0018414),
    (2560, 32, 0.0125, 0.0012353),
    (6144, 44, 0.0080687, 0.00057990),
]


@pytest.mark.parametrize(("hidden", "layers", "small", "wang"), GOLDEN)
def test_small_and_wang_init(hidden: int, layers: int, small: float, wang: float) -> None:
    assert drawn("small_init", hidden, layers, 0.02).std == pytest.approx(small, rel=3e-5)
    assert drawn("wang_init", hidden, layers, 0.02).std == pytest.approx(wang, rel=3e-5)


def test_normal_inits() -> None:
    assert drawn("normal", 64, 8, 0.04).std == 0.04
    assert drawn("scaled_normal", 64, 8, 0.04).std == pytest.approx(0.01)
    assert drawn("single_residual_scaled_normal", 64, 8, 0.04).std == pytest.approx(0.04 / 8**0.5)
    assert drawn("scaled_normal", 4096, 32, 0.02).std == pytest.approx(0.0025)


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_orthogonal_inits(shape: tuple[int, int]) -> None:
    """Torch's own, with the gains of GPT-NeoX's init_functions.py."""
    for method, gain in {"orthogonal": 2**0.5, "scaled_orthogonal": (2 / 8) ** 0.5}.items():
        weight = drawn(method, 64, 8, 0.02)(shape, torch.Generator().manual_seed(3))
        torch.manual_seed(3)
        wanted = torch.nn.init.orthogonal_(torch.empty(shape), gain)
        assert torch.equal(weight, wanted)
        small = weight @ weight.T if shape[0] <= shape[1] else weight.T @ weight
        assert torch.allclose(small, gain**2 * torch.eye(min(shape)), atol=1e-5)


def test_xavier_inits() -> None:
    for method, torchs in {
        "xavier_uniform": torch.nn.init.xavier_uniform_,
        "xavier_normal": torch.nn.init.xavier_normal_,
    }.items():
        weight = drawn(method, 64, 8, 0.02)((300, 200), torch.Generator().manual_seed(3))
        torch.manual_seed(3)
        assert torch.equal(weight, torchs(torch.empty(300, 200)))
        assert weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("method", "output"), [("small_init", "wang_init"), ("normal", "scaled_normal")]
)
def test_each_parameter_has_its_distribution(method: str, output: str) -> None:
    shape = config(256, 3, init_method=method, output_layer_init_method=output)
    model = Decoder(shape)
    initialize(model, start_weights(model.config, 1))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name
            continue
        wanted = drawn(
            output if name.endswith(("attn.out.weight", "mlp.down.weight")) else method,
            256,
            3,
            0.02,
        ).std
        assert parameter.std().item() == pytest.approx(wanted, rel=0.02), name
        assert abs(parameter.mean().item()) < wanted * 0.02, name


def test_a_parameter_depends_on_seed_and_name_alone() -> None:
    shape = config(32, 2)
    torch.manual_seed(0)
    model = Decoder(shape)
    initialize(model, start_weights(model.config, 7))
    weight = model.layers[1].mlp.up.weight
    torch.manual_seed(9)
    assert torch.equal(init_parameter("layers.1.mlp.up.weight", weight.shape, shape, 7), weight)
    others = [("layers.0.mlp.up.weight", 7), ("layers.1.mlp.up.weight", 8)]
    for name, seed in others:
        assert not torch.equal(init_parameter(name, weight.shape, shape, seed), weight)
