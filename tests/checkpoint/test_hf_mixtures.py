"""Folders of experts: which architecture a model is written as, both layouts of the files, and what
is wrong with others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from castalia.checkpoint.hf import hf_config, model_config, write_hf
from castalia.checkpoint.hf.formats import HF
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, build_model_config
from castalia.models.config import TransformerConfig

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}
MOE = {"experts": 3, "top_k": 2, "expert_size": 24}
MIXTRAL = {"family": "mistral", "sliding_window": None, "moe": MOE | {"normalize": True}}
OLMOE = {"family": "llama", "qk_norm": "width", "moe": MOE}
SHARED = {"shared_size": 16, "shared_gate": True}
QWEN = {"family": "qwen2", "moe": MOE | SHARED}


def ours(**values: Any) -> TransformerConfig:
    """A small model's config."""
    config = build_model_config(SHAPE | values, "a test")
    assert isinstance(config, TransformerConfig)
    return config


@pytest.mark.parametrize(
    ("values", "architecture"),
    [
        (MIXTRAL, "MixtralForCausalLM"),
        (MIXTRAL | {"family": "llama", "sliding_window": 5}, "MixtralForCausalLM"),
        (OLMOE | {"moe": MOE | {"capacity_factor": 1.0, "z_loss": 0.1}}, "OlmoeForCausalLM"),
        (QWEN | {"moe": MOE | SHARED | {"interval": 2}}, "Qwen2MoeForCausalLM"),
    ],
)
def test_the_architecture_of_a_mixture_and_its_config_back(
    values: dict[str, Any], architecture: str
) -> None:
    config = ours(**values)
    written = hf_config(config, end_ids=(0,))
    assert written["architectures"] == [architecture]
    back = model_config(written, "config.json")
    assert isinstance(back, TransformerConfig) and back.moe is not None
    assert (back.expert_size, back.moe.balance_loss) == (24, 0.01)
    assert [back.has_experts(i) for i in (0, 1)] == [config.has_experts(i) for i in (0, 1)]
    assert hf_config(back, end_ids=(0,)) == written
    # A run with losses and capacities of its own may start from the folder.
    config = config.model_copy(update={"family": back.family})
    assert back.weights_shape() == config.weights_shape()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (MIXTRAL | {"moe": MOE}, r"MixtralForCausalLM, cannot express moe\.normalize=false"),
        (
            OLMOE | {"moe": MOE | {"shared_size": 16}},
            r"OlmoeForCausalLM, cannot express moe\.shared_size=16",
        ),
        (OLMOE | {"moe": MOE | {"interval": 2}}, r"moe\.interval=2"),
        (OLMOE | {"moe": MOE | {"bias": True}}, r"moe\.bias=true"),
        (OLMOE | {"moe": MOE | {"residual": True}}, r"moe\.residual=true"),
        (OLMOE | {"moe": MOE | {"bias_rate": 0.001}}, r"moe\.bias_rate=0\.001"),
        (OLMOE | {"moe": MOE | {"scores": "sigmoid"}}, r'moe\.scores="sigmoid"'),
        (OLMOE | {"moe": MOE | {"eval_capacity_factor": 2.0}}, r"moe\.eval_capacity_factor=2\.0"),
        ({"moe": MOE}, r"GPTNeoXForCausalLM, cannot express moe$"),
        (QWEN | {"moe": MOE | {"shared_size": 16}}, r"moe\.shared_gate=false"),
    ],
)
def test_what_no_mixture_expresses_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_config(ours(**values), end_ids=(0,))


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (MIXTRAL, {"num_experts_per_tok": 4}, r"moe\.top_k 4 is above moe\.experts 3; lower it"),
        (MIXTRAL, {"num_local_experts": 1}, r"moe\.experts"),
        (MIXTRAL, {"num_experts": 5}, "num_local_experts and num_experts are one option"),
        (MIXTRAL, {"num_shared_experts": 1}, "does not implement num_shared_experts=1"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv 8.0: only null is supported"),
        (QWEN, {"decoder_sparse_step": 2}, r"the layers with experts are \[1\]; Castalia has them"),
        (QWEN, {"mlp_only_layers": [0, 1]}, r"the layers with experts are \[\]"),
        (QWEN, {"mlp_only_layers": 1}, "expected a list of layers"),
        (QWEN, {"decoder_sparse_step": 0}, "expected a positive integer"),
        (
            QWEN,
            {"use_sliding_window": True, "layer_types": None},
            "use_sliding_window true: name the layers in layer_types",
        ),
    ],
)
def test_a_config_of_another_mixture_is_refused(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    written = hf_config(ours(**values), end_ids=(0,))
    with pytest.raises(ConfigError, match=message) as raised:
        model_config(written | change, "a/config.json")
    assert "a/config.json" in str(raised.value)


def folder_of(path: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    """A folder with random weights, and the weights under our names."""
    config = ours(**values)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in Decoder(config).state_dict().items()
    }
    path.mkdir()
    write_hf(path, tensors, config, end_ids=(0,), max_shard_size="20KB")
    return tensors


@pytest.mark.parametrize("values", [MIXTRAL, QWEN], ids=["mixtral", "qwen2 moe"])
def test_stacks_of_transformers_5_are_read_as_matrices_of_experts_are(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    tensors = folder_of(tmp_path / "apart", values)
    assert len(list((tmp_path / "apart").glob("*.safetensors"))) > 2
    source = open_model(tmp_path / "apart")
    form = HF[{"mistral": "mixtral", "qwen2": "qwen2_moe"}[values["family"]]]
    (tmp_path / "stacked").mkdir()
    write_hf(tmp_path / "stacked", tensors, source.config, end_ids=(0,))
    names = form.keymap_of(source.config, ["model.layers.0.mlp.experts.gate_up_proj"])
    stacked = names.to_theirs(tensors)
    assert stacked["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 48, 32)
    save_file(
        {name: tensor.contiguous() for name, tensor in stacked.items()},
        tmp_path / "stacked" / "model.safetensors",
    )
    for folder in ("apart", "stacked"):
        read = open_model(tmp_path / folder).tensors
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        part = (slice(1, 2), slice(3, 9), slice(0, 32))
        stack = read.stored("layers.1.mlp.experts.up")
        assert torch.equal(stack[part], tensors["layers.1.mlp.experts.up"][part])


def test_weights_of_other_experts_than_the_config_says(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder_of(folder, MIXTRAL)
    weights = {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for path in folder.glob("model*"):
        path.unlink()
    lost = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    fourth = lost.replace("experts.1", "experts.3")
    router = "model.layers.0.block_sparse_moe.gate.weight"
    cases = [
        ({name: weights[name] for name in weights if name != lost}, f"missing: '{lost}'"),
        (weights | {fourth: weights[lost].clone()}, f"no rule knows: '{fourth}'"),
        (weights | {router: torch.zeros(4, 32)}, rf"'{router}' is \[4, 32\], expected \[3, 32\]"),
        (weights | {lost: torch.zeros(25, 32)}, rf"'{lost}' is \[25, 32\], expected \[24, 32\]"),
    ]
    for content, message in cases:
        save_file(content, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            open_model(folder)
