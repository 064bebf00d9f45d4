"""Which architecture a model is written as, what each lacks, and config.json files as published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from castalia.checkpoint.hf import hf_config, model_config, write_hf
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, build_model_config
from castalia.models.config import TransformerConfig
from castalia.recipes import load_config

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}
SERIAL = {"parallel_residual": False}
BARE = {"attention_bias": False, "mlp_bias": False}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "rotary_pct": 1.0, **SERIAL, **BARE}
WINDOW = {"sliding_window": 5}


def ours(**values: Any) -> TransformerConfig:
    """A small model's config."""
    config = build_model_config(SHAPE | values, "a test")
    assert isinstance(config, TransformerConfig)
    return config


@pytest.mark.parametrize(
    ("values", "architecture"),
    [
        ({}, "GPTNeoXForCausalLM"),
        ({"activation": "relu2", "rotary_pct": 0.0}, "GPTNeoXForCausalLM"),
        (LLAMA, "LlamaForCausalLM"),
        (LLAMA | {"num_kv_heads": 2, "attention_bias": True}, "LlamaForCausalLM"),
        (LLAMA | WINDOW, "MistralForCausalLM"),
        (LLAMA | WINDOW | {"qkv_bias": True}, "Qwen2ForCausalLM"),
        (LLAMA | {"qk_norm": "head"}, "Qwen3ForCausalLM"),
        (LLAMA | {"qk_norm": "width", "norm_placement": "post"}, "Olmo2ForCausalLM"),
        (LLAMA | {"norm": "non_parametric_layernorm"}, "OlmoForCausalLM"),
        (LLAMA | {"output_multiplier": 0.5}, "GraniteForCausalLM"),
        (LLAMA | {"norm": "layernorm"}, "StableLmForCausalLM"),
        ({"pos_emb": "learned", **SERIAL}, "GPT2LMHeadModel"),
        ({"family": "palm"}, "StableLmForCausalLM"),
        ({"family": "palm", "activation": "gelu"}, "FalconForCausalLM"),
        ({"family": "qwen2"}, "Qwen2ForCausalLM"),
        ({"family": "qwen2", "qkv_bias": False, "qk_norm": "head"}, "Qwen3ForCausalLM"),
        ({"family": "llama", **WINDOW}, "MistralForCausalLM"),
        ({"family": "mistral", "sliding_window": None}, "MistralForCausalLM"),
        ({"family": "falcon", "rotary_pct": 0.5, "num_kv_heads": 4, "shared_norm": False,
          "attention_bias": True, "mlp_bias": True}, "GPTNeoXForCausalLM"),
    ],
)  # fmt: skip
def test_the_first_architecture_that_expresses_a_model(values: dict, architecture: str) -> None:
    assert hf_config(ours(**values), end_ids=(0,))["architectures"] == [architecture]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_kv_heads": 2}, "GPTNeoXForCausalLM, cannot express num_kv_heads=2"),
        ({"norm": "rmsnorm"}, "GPTNeoXForCausalLM, cannot express norm=rmsnorm"),
        ({"norm": "scalenorm"}, "norm=scalenorm"),
        ({"activation": "softsign"}, "activation=softsign"),
        ({"activation": "swiglu", "mlp_bias": False}, "cannot express activation=swiglu"),
        ({"pos_emb": "alibi"}, "pos_emb=alibi"),
        ({"pos_emb": "rpe"}, "pos_emb=rpe"),
        ({"pos_emb": "sinusoidal"}, "pos_emb=sinusoidal"),
        ({"shared_norm": True}, "shared_norm=true"),
        ({"qk_norm": "neox"}, "qk_norm=neox"),
        ({"qkv_bias": False}, "qkv_bias=false"),
        ({"attention_head_dim": 16}, "attention_head_dim=16"),
        (WINDOW, "sliding_window=5"),
        ({"output_multiplier": 0.5}, "GPTNeoXForCausalLM, cannot express output_multiplier=0.5"),
        (LLAMA | {"rotary_pct": 0.5}, "LlamaForCausalLM, cannot express rotary_pct=0.5"),
        (LLAMA | {"rmsnorm_partial": 0.5}, "rmsnorm_partial=0.5"),
        ({"family": "palm", "mlp_bias": True}, "StableLmForCausalLM, cannot express mlp_bias=true"),
        ({"family": "gpt2", "learned_offset": 2}, "learned_offset=2"),
        ({"family": "falcon", "mlp_bias": True}, "FalconForCausalLM, cannot express mlp_bias=true"),
        (
            {"family": "falcon", "num_kv_heads": 2, "shared_norm": False, **SERIAL},
            "FalconForCausalLM, cannot express num_kv_heads=2",
        ),
        (
            {"family": "mistral", "attention_config": ["global", "sliding"], "mlp_bias": True},
            r"cannot express .*attention_config=\[\"global\", \"sliding\"\]",
        ),
        (
            LLAMA | {"num_attention_heads": 5, "attention_head_dim": 8, "mlp_bias": True},
            "num_attention_heads=5 with hidden_size=32",
        ),
    ],
)  # fmt: skip
def test_what_no_architecture_expresses_is_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_config(ours(**values), end_ids=(0,))


# Sizes and switches of config.json files on the hub, without keys that change no logits.
LLAMA_FILE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
FALCON_FILE = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "apply_residual_connection_post_layernorm": False,
    "layer_norm_epsilon": 1e-05,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "vocab_size": 65024,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_FILE
    | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 4096},
    "llama-3.1-8b": LLAMA_FILE
    | {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "mistral-7b": LLAMA_FILE
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "falcon-7b": FALCON_FILE
    | {
        "alibi": False,
        "bias": False,
        "hidden_size": 4544,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
    },
    "falcon-40b": FALCON_FILE
    | {
        "alibi": False,
        "bias": False,
        "hidden_size": 8192,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "parallel_attn": True,
    },
    "falcon-rw-1b": FALCON_FILE
    | {
        "alibi": True,
        "bias": True,
        "hidden_size": 2048,
        "multi_query": False,
        "new_decoder_architecture": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "parallel_attn": False,
        "vocab_size": 50304,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmo-2-7b": {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "olmoe-1b-7b": LLAMA_FILE
    | {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    },
    "mixtral-8x7b": LLAMA_FILE
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "vocab_size": 32000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name: str) -> None:
    config = model_config(PUBLISHED[name], "config.json")
    preset = load_config([name]).model
    assert config.weights_shape() == preset.weights_shape()
    assert config.max_position_embeddings == preset.max_position_embeddings


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"final_logit_softcapping": 30.0}, "implement final_logit_softcapping=30.0"),
        ("llama", {"rope_tehta": 5e5}, "implement rope_tehta=500000.0; did you mean 'rope_theta'"),
        ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}'),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: only 1.0"),
        ("llama", {"hidden_act": "tanh"}, "unknown hidden_act 'tanh'; choose one of gelu"),
        ("llama", {"num_key_value_heads": 3}, "4 is not divisible by num_kv_heads 3"),
        ("llama", {"hidden_size": "32"}, "hidden_size 32: expected an integer"),
        ("llama", {"intermediate_size": None}, "intermediate_size is missing"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type su: choose one of"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_parameters: factor is missing"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 3}},
            "rope_parameters: Castalia does not implement alpha=3",
        ),
        ("llama", {"rope_scaling": {"full_attention": {"factor": 2}}}, "differ by layer"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "unknown architectures"),
        ("qwen2", {"layer_types": ["full_attention"]}, "has 1 kinds, num_hidden_layers is 2"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "choose among full_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "two norms need new_decoder_architecture"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn fal"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx true: only false"),
        ("gpt2", {"n_embd": 32, "hidden_size": 64}, "n_embd and hidden_size are one option"),
        ("gpt2", {"add_cross_attention": True}, "implement add_cross_attention=true"),
        (
            "llama",
            {"model_type": "granite", "architectures": None},
            "attention_multiplier 1.0: only",
        ),
        ("palm", {"qk_layernorm": True}, "qk_layernorm true: only false"),
    ],
)
def test_a_key_that_changes_the_model_is_never_ignored(
    family: str, change: dict, message: str
) -> None:
    values = hf_config(ours(family=family), end_ids=(0,))
    if "rope_scaling" in change:
        del values["rope_parameters"]
    with pytest.raises(ConfigError, match=message) as raised:
        model_config(values | change, "a/config.json")
    assert "a/config.json" in str(raised.value)


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A model with grouped queries."""
    config = ours(family="llama", num_kv_heads=2)
    write_hf(tmp_path, drawn(config), config, end_ids=(0,))
    return tmp_path


def drawn(config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Random weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in Decoder(config).state_dict().items()
    }


def test_weights_that_do_not_fit_the_config(llama_folder: Path) -> None:
    path = llama_folder / "model.safetensors"
    weights = load_file(path)
    key = "model.layers.1.self_attn.k_proj.weight"
    save_file({**weights, key: weights[key][:-1]}, path)
    with pytest.raises(CheckpointError, match=rf"'{key}' is \[15, 32\], expected \[16, 32\]"):
        open_model(llama_folder)
    save_file({**weights, "model.layers.0.self_attn.sinks": torch.ones(4)}, path)
    with pytest.raises(CheckpointError, match=r"no rule knows: 'model\.layers\.0\.self_attn\.s"):
        open_model(llama_folder)
    save_file({name: weights[name] for name in weights if name != key}, path)
    with pytest.raises(CheckpointError, match=f"missing: '{key}'"):
        open_model(llama_folder)


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("falcon", "query_key_value.weight", (49, 32)),
        ("gpt2", "c_attn.weight", (96,)),
        ("gpt2", "c_attn.weight", (32, 97)),
    ],
)
def test_a_fused_matrix_of_another_shape_is_named(
    tmp_path: Path, family: str, key: str, shape: tuple
) -> None:
    config = ours(family=family)
    write_hf(tmp_path, Decoder(config).state_dict(), config, end_ids=(0,))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith(key))
    save_file(weights | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{key}' is .* expected .* describes another model"):
        open_model(tmp_path)


def test_null_is_off_where_a_missing_key_is_on() -> None:
    def read(family: str, **changes: Any) -> TransformerConfig:
        values = hf_config(ours(family=family, num_kv_heads=4), end_ids=(0,)) | changes
        config = model_config(values, "a/config.json", None)
        assert isinstance(config, TransformerConfig)
        return config

    qwen = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    assert read("qwen2", **qwen, sliding_window=None).sliding_window is None
    assert read("qwen2", **qwen, sliding_window=7).sliding_window == 7
    assert read("falcon", multi_query=None).kv_heads == 4
    assert not read("falcon", parallel_attn=None).parallel_residual
    assert not read("gpt2", tie_word_embeddings=None).tie_word_embeddings


def test_a_model_without_its_head_is_read_by_the_shorter_names(llama_folder: Path) -> None:
    """As AutoModel saves it; `optional` says that the head may be missing."""
    path = llama_folder / "model.safetensors"
    whole = open_model(llama_folder).tensors
    want = {name: whole[name] for name in whole if name != "unembed.weight"}
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()}, path)
    got = open_model(llama_folder, optional=["unembed.*"]).tensors
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_scaled_bases_and_lengths(tmp_path: Path) -> None:
    """ntk is another base to transformers; dynamic starts from max_position_embeddings there."""
    ntk = ours(family="llama", rope_scaling={"kind": "ntk", "factor": 2.0})
    values = hf_config(ntk, end_ids=(0,))
    assert values["rope_theta"] == 10000.0 * 2.0 ** (8 / 6) and values["rope_scaling"] is None
    dynamic = {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
    config = ours(family="llama", rope_scaling=dynamic)
    values = hf_config(config, end_ids=(0,))
    assert values["max_position_embeddings"] == 512
    again = model_config(json.loads(json.dumps(values)), "config.json")
    assert isinstance(again, TransformerConfig) and again.rope_scaling == config.rope_scaling
