"""Experts, Mamba, RWKV, gMLP and aMLP as GPT-NeoX checkpoints: what is written is read back bit for
bit, its YAML has options that GPT-NeoX knows, and what it lacks is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.config.neox_keys import NAMES
from castalia.core.errors import ConfigError
from castalia.export.formats import EXPORTS
from castalia.export.neox import write_neox
from castalia.export.neox_config import NeoxShape
from castalia.formats.saved_model import SavedModel, open_model
from castalia.models import Decoder, build_model_config
from castalia.runs.config import RunConfig

SIZES = {"num_layers": 2, "hidden_size": 32, "vocab_size": 128, "max_position_embeddings": 16}
MOE = {"experts": 4, "top_k": 2}
NEOX = {"num_attention_heads": 4, "parallel_residual": False, "activation": "relu"}
BARE = {"bias": False, "residual": False}
CASES: dict[str, dict[str, Any]] = {
    "experts": NEOX | {"moe": MOE | {"interval": 2}, "intermediate_size": 48},
    "sinkhorn": NEOX
    | {"moe": {"experts": 4, "router": "sinkhorn", "scores": "sigmoid", "expert_size": 24}},
    "mamba": {"family": "mamba", "mamba": {"inner_size": 48}},
    "rwkv6": {"family": "rwkv6", "rwkv6": {"head_size": 16, "ffn_size": 64}},
    "gmlp": {"family": "gmlp", "gmlp": BARE},
    "amlp": {"family": "amlp", "gmlp": BARE | {"attention_size": 8}, "norm": "rmsnorm"},
}


def saved(folder: Path, values: dict[str, Any]) -> SavedModel:
    """A run with random weights."""
    config = build_model_config(SIZES | values, "a test")
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"model.{name}": torch.randn(tensor.shape, generator=generator)
        for name, tensor in Decoder(config).state_dict().items()
    }
    if config.family == "rwkv6":
        # GPT-NeoX has one norm for both.
        for kind in ("weight", "bias"):
            tensors[f"model.layers.0.norm0.{kind}"] = tensors[f"model.layers.0.norm1.{kind}"]
    files = {"config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 16}))}
    Store(folder / "checkpoints").save(5, tensors, {"step": 5}, files, asynchronous=False)
    return open_model(folder)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "run", CASES[name])
    assert EXPORTS["neox"].refuses(source.config, "fp32") is None
    assert EXPORTS["neox"].notes(source)
    shapes = [NeoxShape(1, 1)]
    if source.config.family == "neox":
        shapes += [NeoxShape(2, 1), NeoxShape(2, 0)]
    for number, shape in enumerate(shapes):
        out = tmp_path / str(number)
        out.mkdir()
        write_neox(out, source.tensors, source.config, dtype="fp32", shape=shape, step=5)
        options = yaml.safe_load((out / "global_step5" / "configs" / "model.yml").read_text())
        assert set(options) <= set(NAMES)
        back = open_model(out)
        assert back.config.family == source.config.family
        for key, tensor in source.tensors.items():
            assert torch.equal(back.tensors[key], tensor), key
        ids = torch.arange(10)[None]
        with torch.no_grad():
            logits = []
            for model in (source, back):
                decoder = Decoder(model.config).eval()
                decoder.load_state_dict(dict(model.tensors))
                logits.append(decoder.head(decoder(ids)))
        assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_a_norm_of_the_embedding_alone_has_no_place(tmp_path: Path) -> None:
    source = saved(tmp_path / "run", CASES["rwkv6"])
    other = dict(source.tensors)
    other["layers.0.norm0.bias"] = other["layers.0.norm0.bias"] + 1
    with pytest.raises(ConfigError, match="norms the embedding of RWKV with the first layer's"):
        write_neox(tmp_path, other, source.config, dtype="fp32", shape=NeoxShape())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (NEOX | {"moe": MOE | {"normalize": True}}, "model.moe.normalize=true"),
        (NEOX | {"moe": MOE | {"shared_size": 8}}, "model.moe.shared_size=8"),
        (NEOX | {"moe": MOE | {"scores": "sigmoid"}}, "scores=sigmoid with moe.router=topk"),
        (NEOX | {"moe": MOE, "activation": "swiglu"}, "its experts have no gate"),
        (NEOX | {"moe": MOE, "activation": "gelu_tanh"}, "exact GELU alone"),
        (NEOX | {"moe": MOE, "parallel_residual": True}, "it leaves out the attention"),
        (
            NEOX | {"moe": MOE | {"interval": 2, "expert_size": 8}},
            "model.moe.expert_size=8 beside intermediate_size=128",
        ),
        ({"family": "mamba2", "mamba2": {"head_size": 16}}, "model.family=mamba2"),
        ({"family": "rwkv7", "rwkv7": {"head_size": 16}}, "model.family=rwkv7"),
        ({"family": "mamba", "mamba": {"state_size": 8}}, "model.mamba.state_size=8"),
        ({"family": "rwkv6", "rwkv6": {"mix_rank": 8, "head_size": 16}}, "ranks=(8, 64)"),
        ({"family": "gmlp"}, "model.gmlp.bias=True"),
        ({"family": "gmlp", "gmlp": {"bias": False}}, "model.gmlp.residual=True"),
        ({"family": "mamba", "output_multiplier": 2.0}, "model.output_multiplier=2.0"),
    ],
)
def test_what_gpt_neox_lacks_is_named(values: dict[str, Any], message: str) -> None:
    config = build_model_config(SIZES | values, "a test")
    assert message in (EXPORTS["neox"].refuses(config, "fp32") or "nothing")
