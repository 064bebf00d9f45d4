"""Mamba and Mamba 2 against the slow paths of transformers, fp32: logits, gradients and folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.checkpoint.hf import hf_config, hf_keymap, model_config, read_hf, write_hf
from castalia.core.errors import ConfigError
from castalia.models import Decoder, ModelConfig, build_model_config
from castalia.models.init import start_weights

transformers = pytest.importorskip("transformers")

SIZES = {"num_layers": 2, "hidden_size": 16, "vocab_size": 61, "make_vocab_size_divisible_by": 1}
SMALL = {"state_size": 5, "conv_size": 3}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"family": "mamba", "mamba": SMALL | {"dt_rank": 2}},
    "mamba with biases": {
        "family": "mamba",
        "tie_word_embeddings": False,
        "mamba": SMALL | {"inner_size": 16, "bias": True, "conv_bias": False},
    },
    "mamba2": {"family": "mamba2", "mamba2": SMALL | {"head_size": 4, "chunk_size": 4}},
    "mamba2 of groups": {
        "family": "mamba2",
        "tie_word_embeddings": False,
        "mamba2": SMALL
        | {"head_size": 4, "groups": 4, "bias": True, "conv_bias": False, "chunk_size": 8}
        # Bounds that the time steps at the start go beyond.
        | {"dt_limit": [0.003, 0.3]},
    },
}


def config_of(name: str, **values: Any) -> ModelConfig:
    return build_model_config(SIZES | {"init_method_std": 0.3} | MODELS[name] | values, "a test")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights(parameter_name, parameter.shape))
            # Unequal, where equal ones would hide a fault.
            if parameter_name.endswith(("norm.weight", "ssm.D", "ssm.A_log")):
                factors = torch.linspace(0.5, 1.5, parameter.numel())
                parameter.mul_(factors.view(parameter.shape))
    write_hf(tmp_path, model.state_dict(), config, end_ids=[60])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = model.head(model(tokens))
    expected = theirs(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * factors).sum().backward()
    (expected * factors).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mine = hf_keymap(config).to_theirs(gradients)
    parameters = {n: p for n, p in theirs.named_parameters() if n in mine}
    assert parameters.keys() == mine.keys()
    for key, parameter in parameters.items():
        error = (mine[key] - parameter.grad).abs().max()
        assert error <= 1e-5 * max(1, float(parameter.grad.abs().max())), key
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        read, again = read_hf(folder)
        assert again.weights_shape() == config.weights_shape()
        for parameter_name, tensor in model.state_dict().items():
            assert torch.equal(read[parameter_name], tensor), parameter_name


PUBLISHED = {
    "mamba": (
        {"hidden_size": 768, "expand": 2, "d_inner": 1536, "d_model": 768, "n_layer": 24}
        | {"fused_add_norm": True, "rms_norm": True, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
        | {"num_hidden_layers": 24, "state_size": 16, "time_step_rank": 48, "conv_kernel": 4}
        | {"rescale_prenorm_residual": False, "residual_in_fp32": True, "use_bias": False}
        | {"time_step_init_scheme": "random", "time_step_scale": 1.0, "vocab_size": 50280}
    ),
    "mamba2": (
        {"hidden_size": 4096, "expand": 2, "num_heads": 128, "head_dim": 64, "n_groups": 8}
        | {"norm_before_gate": True, "rms_norm": True, "chunk_size": 256, "state_size": 128}
        | {"num_hidden_layers": 64, "time_step_limit": [0.0, float("inf")], "vocab_size": 32768}
    ),
}
"""config.json of state-spaces/mamba-130m-hf and of a published Mamba 2, but for common keys."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    values = PUBLISHED[name] | {"model_type": name, "hidden_act": "silu"}
    config = model_config(values, "config.json")
    written = hf_config(config, end_ids=[0])
    # Strictly: a JSON file has no infinity.
    json.dumps(written, allow_nan=False)
    for key in ("hidden_size", "expand", "state_size", "vocab_size", "num_hidden_layers"):
        assert written[key] == values[key]
    assert model_config(written, "config.json").weights_shape() == config.weights_shape()
    for key, wrong in (("hidden_act", "relu"), ("expand", 1.5), ("sliding_window", 5)):
        with pytest.raises(ConfigError, match=f"config.json.*{key}"):
            model_config(values | {key: wrong}, "config.json")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("mamba", {"norm": "layernorm"}, "cannot express norm=layernorm"),
        ("mamba", {"mamba": {"inner_size": 24}}, "inner_size=24, no multiple of hidden_size"),
        ("mamba2", {"output_multiplier": 2.0}, "cannot express output_multiplier=2.0"),
    ],
)
def test_what_transformers_lacks_is_refused(
    name: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_config(config_of(name, **values), end_ids=[0])
