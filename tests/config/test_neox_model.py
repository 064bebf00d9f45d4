"""GPT-NeoX's options about the model, read as ours."""

import pytest

from castalia.config import flatten
from castalia.config.neox import read_neox

SMALL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_iters": 10,
    "train_micro_batch_size_per_gpu": 4,
}
LLAMA = {
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias_in_mlp": False,
    "use_bias_in_attn_linear": False,
    "mlp_multiple_of": 32,
}


def read(**options):
    """The reading of a small file, which must have no problems."""
    reading = read_neox({"small.yml": SMALL | options})
    assert reading.problems == []
    return reading


def model_of(**options):
    """Its section `model`."""
    return flatten(read(**options).values["model"])


def test_silence_means_learned_positions():
    model = model_of()
    assert (model["pos_emb"], model["learned_offset"]) == ("learned", 0)


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        *(({"pos_emb": kind}, "pos_emb", kind) for kind in ("alibi", "sinusoidal", "rpe", "none")),
        ({"opt_pos_emb_offset": 2}, "learned_offset", 2),
        ({"pos_emb": "rpe", "rpe_num_buckets": 16}, "rpe_num_buckets", 16),
        ({"pos_emb": "rpe"}, "rpe_max_distance", 128),
        ({"norm": "te_layernorm"}, "norm", "layernorm"),
        ({"norm": "non_parametric_layernorm"}, "norm", "non_parametric_layernorm"),
        ({"norm": "rmsnorm"}, "layernorm_epsilon", 1e-8),
        ({"norm": "te_rmsnorm", "rms_norm_epsilon": 1e-6}, "layernorm_epsilon", 1e-6),
        ({"norm": "scalenorm"}, "layernorm_epsilon", 1e-8),
        ({"norm": "scalenorm", "scalenorm_epsilon": 1e-4}, "layernorm_epsilon", 1e-4),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon", 1e-6),
        *(({"activation": name}, "activation", name) for name in ("relu", "softsign", "mish")),
        *(({"activation": name}, "activation", name) for name in ("swish", "silu")),
        ({"activation": "geglu", "bias_gelu_fusion": True}, "activation", "geglu"),
        ({"te_layernorm_mlp": True}, "activation", "gelu_tanh"),
        ({"te_layernorm_mlp": True, "use_bias_in_mlp": False}, "mlp_bias", True),
        ({"te_layernorm_mlp": True, "activation": "geglu"}, "intermediate_size", 256),
        ({"gpt_j_residual": True, "gpt_j_tied": True}, "shared_norm", True),
        ({"gpt_j_tied": True}, "shared_norm", False),
        ({"use_qk_layernorm": True}, "qk_norm", "neox"),
        ({"num_kv_heads": 2}, "num_kv_heads", 2),
        ({"num_kv_heads": 2, "attention_type": "groupedquery"}, "num_kv_heads", 2),
        ({"hidden_dropout": 0.1}, "hidden_dropout", 0.1),
        ({"attention-dropout": 0.2}, "attention_dropout", 0.2),
        ({"init_method": "orthogonal"}, "init_method", "orthogonal"),
        (
            {"output_layer_init_method": "scaled_orthogonal"},
            "output_layer_init_method",
            "scaled_orthogonal",
        ),
        ({"sliding_window_width": 7}, "sliding_window", 8),
        (
            {"attention_config": [[["local", "global"], "all"]]},
            "attention_config",
            ["local", "global"],
        ),
        (
            {"attention_config": [[["bigbird"], 3], [["flash"], 1]]},
            "attention_config",
            ["bigbird", "bigbird", "bigbird", "global"],
        ),
        (
            {"attention_config": [[["local", "flash"], "all"]], "sliding_window_width": 7},
            "attention_config",
            ["local", "sliding"],
        ),
        (
            {
                "attention_config": [[["sparse_fixed"], "all"]],
                "sparsity_config": {"block": 16, "num_local_blocks": 32},
            },
            "sparsity_config.num_local_blocks",
            32,
        ),
    ],
)
def test_option(options, key, value):
    assert model_of(**options)[key] == value


def test_full_attention_needs_no_list_of_kinds():
    model = model_of(attention_config=[[["flash", "global"], "all"]], sparsity_config={"block": 8})
    assert not any("attention_config" in key or "sparsity" in key for key in model)
    assert "attention_config" not in model_of(sliding_window_width=7)
    # Over a preset, whose layers may slide, it is said.
    over = read_neox({"over.yml": {"attention_config": [[["flash"], 2]]}}, complete=False)
    assert over.values["model"]["attention_config"] == ["global"]


@pytest.mark.parametrize(
    ("hidden", "options", "width"),
    [
        # configs/llama and llama2: the widths of LLaMA 7B, 13B, 30B, 65B, and of Llama 2 70B
        (4096, {"intermediate_size": 32768, "mlp_multiple_of": 256}, 11008),
        (5120, {"intermediate_size": 40960, "mlp_multiple_of": 256}, 13824),
        (6656, {"intermediate_size": 53248, "mlp_multiple_of": 256}, 17920),
        (8192, {"intermediate_size": 65536, "mlp_multiple_of": 256}, 22016),
        (8192, {"intermediate_size": 86016, "mlp_multiple_of": 256}, 28672),
        # post-training: one unit as wide as the MLP
        (4096, {"intermediate_size": 14336, "mlp_multiple_of": 14336}, 14336),
        # configs/llama2/codellama_7B.yml names no width
        (4096, {"mlp_multiple_of": 256}, 5632),
        (64, {"expansion_factor": 3}, 64),
        # configs/mistral/7B.yml: 4779 outputs for 4778 inputs today, 14336 of both before
        (4096, {"intermediate_size": 14336}, 14336),
    ],
)
def test_width_of_a_gated_mlp(hidden, options, width):
    sizes = {"hidden_size": hidden, "num_attention_heads": 32}
    reading = read(**(LLAMA | {"mlp_multiple_of": 1} | sizes | options))
    assert reading.values["model"]["intermediate_size"] == width
    assert any(note.key == "model.intermediate_size" for note in reading.notes)


def test_a_width_that_gpt_neox_cannot_build_is_that_of_its_older_rule():
    """configs/mistral/7B.yml, written when a gated MLP had intermediate_size and no biases."""
    mistral = LLAMA | {"intermediate_size": 104, "mlp_multiple_of": 1, "sliding_window_width": 7}
    del mistral["use_bias_in_mlp"]
    reading = read(**mistral)
    model = reading.values["model"]
    assert (model["family"], model["intermediate_size"], model["mlp_bias"]) == (
        "mistral",
        104,
        False,
    )
    (text,) = [note.text for note in reading.notes if note.key == "model.intermediate_size"]
    assert text.startswith("swiglu with 104 gives the first matrix twice 35 outputs and the second")
    assert read(**(mistral | {"use_bias_in_mlp": True})).values["model"]["mlp_bias"] is True


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({}, "llama"),
        ({"num_kv_heads": 2}, "llama"),
        ({"use_bias_in_mlp": True}, "llama"),
        ({"norm": "te_rmsnorm"}, "llama"),
        ({"attention_config": [[["flash"], 4]]}, "llama"),
        ({"sliding_window_width": 7}, "mistral"),
        ({"sliding_window_width": 7, "use_bias_in_mlp": True}, "neox"),
        ({"norm": "layernorm"}, "neox"),
        ({"activation": "gelu"}, "neox"),
        ({"rotary_pct": 0.5}, "neox"),
        ({"pos_emb": "alibi"}, "neox"),
        ({"gpt_j_residual": True}, "neox"),
        ({"use_qk_layernorm": True}, "neox"),
        ({"attention_config": [[["flash", "local"], "all"]]}, "neox"),
    ],
)
def test_the_family_is_that_whose_blocks_the_options_compute(options, family):
    reading = read(**(LLAMA | options))
    assert reading.values["model"]["family"] == family
    assert any(note.key == "model.family" for note in reading.notes) == (family != "neox")


def test_biases_of_a_llama_that_no_file_names():
    silent = {key: value for key, value in LLAMA.items() if key != "use_bias_in_mlp"}
    reading = read(**silent)
    assert reading.values["model"]["mlp_bias"] is True
    assert any("model.mlp_bias=false" in note.text for note in reading.notes)


def test_options_of_another_kind_are_listed_as_ignored():
    reading = read(norm="rmsnorm", layernorm_epsilon=1e-6, rpe_num_buckets=4, gpt_j_tied=True)
    ignored = {name for names in reading.ignored.values() for name in names}
    assert {"layernorm_epsilon", "rpe_num_buckets", "gpt_j_tied"} <= ignored


def test_over_a_preset_the_family_and_the_norm_stay():
    reading = read_neox({"s.yml": {"rms_norm_epsilon": 1e-6}}, complete=False)
    assert reading.values == {"model": {"layernorm_epsilon": 1e-6}}
    assert read_neox({"s.yml": {"save": "out"}}, complete=False).values == {"output": "out"}
