"""GPT-NeoX's experts, and its layers without attention, read as ours."""

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
    "pos_emb": "none",
}
EIGHT = {"moe_num_experts": 8}
DEEPSPEED = EIGHT | {"moe_type": "deepspeed"}
MEGABLOCKS = EIGHT | {"moe_type": "megablocks"}
DROPPING = DEEPSPEED | {"moe_token_dropping": True}


def read(**options):
    """The reading of a small file, which must have no problems."""
    reading = read_neox({"small.yml": SMALL | options})
    assert reading.problems == []
    return reading


def model_of(**options):
    """Its section `model`."""
    return flatten(read(**options).values["model"])


def layers(*items):
    """The option attention_config."""
    return {"attention_config": [list(item) for item in items]}


MAMBA = layers([["mamba"], "all"])
RWKV = layers([["rwkv"], "all"])
GMLP = layers([["gmlp"], "all"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Today's defaults: dropless, Sinkhorn's router, experts in all layers, no loss.
        (
            EIGHT,
            {"experts": 8, "top_k": 1, "interval": 1, "router": "sinkhorn", "scores": "sigmoid"},
        ),
        (EIGHT, {"group": "pass", "balance_loss": 0.0, "bias": False}),
        (EIGHT | {"moe_top_k": 2}, {"top_k": 2, "router": "sinkhorn", "scores": "softmax"}),
        (
            EIGHT | {"moe_router_type": "topk", "moe_jitter_eps": 0.01},
            {"router": "topk", "scores": "softmax", "jitter": 0.01},
        ),
        (EIGHT | {"moe_expert_interval": 2}, {"interval": 2}),
        # The other MLPs' is rounded up to 100.
        (EIGHT | {"intermediate_size": 90, "mlp_multiple_of": 50}, {"expert_size": 90}),
        # 4 * 72 = 288 in the other MLPs, and a multiple of 256 in the experts.
        (EIGHT | {"hidden_size": 72}, {"expert_size": 512}),
        (EIGHT | {"model_parallel_size": 2}, {"split_over_tp": True}),
        # Those of before, which any of its options chooses.
        (
            MEGABLOCKS,
            {"interval": 2, "router": "topk", "scores": "softmax", "balance_loss": 0.1},
        ),
        (MEGABLOCKS, {"capacity_factor": None, "eval_capacity_factor": None, "bias": False}),
        (MEGABLOCKS | {"moe_top_k": 2}, {"normalize": False}),
        (MEGABLOCKS | {"moe_jitter_eps": 0.1}, {"jitter": 0.1}),
        (DEEPSPEED, {"residual": True, "normalize": False, "bias": True}),
        (DEEPSPEED | {"moe_use_residual": False, "use_bias_in_mlp": False}, {"residual": False}),
        (DEEPSPEED | {"moe_top_k": 2}, {"normalize": True}),
        (DROPPING, {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 4}),
        (
            DROPPING
            | {
                "moe_train_capacity_factor": 1.25,
                "moe_eval_capacity_factor": 2.0,
                "moe_min_capacity": 0,
            },
            {"capacity_factor": 1.25, "eval_capacity_factor": 2.0, "min_capacity": 0},
        ),
        (DROPPING, {"group": "pass"}),
        (EIGHT | {"moe_loss_coeff": 0.02}, {"balance_loss": 0.02, "interval": 2}),
        (EIGHT | {"expert_interval": 3}, {"interval": 3, "router": "topk"}),
        (EIGHT | {"enable_expert_tensor_parallelism": True}, {"split_over_tp": True}),
        # What was to come soon.
        (DROPPING | {"moe_router_type": "sinkhorn"}, {"router": "sinkhorn", "residual": True}),
    ],
)
def test_experts(options, expected):
    model = model_of(**options)
    assert {key: model[f"moe.{key}"] for key in expected} == expected


def test_ranks_that_split_the_experts():
    values = flatten(read(**MEGABLOCKS, moe_expert_parallel_size=4).values)
    assert values["parallel.ep"] == 4
    assert "parallel.ep" not in flatten(read(**MEGABLOCKS).values)


def test_experts_of_today_have_no_gate():
    model = model_of(**EIGHT, activation="swiglu", hidden_size=64)
    # A gated MLP of two thirds does not come into it.
    assert (model["activation"], model["moe.expert_size"]) == ("silu", 256)
    # Before, experts were the MLP of the model.
    assert model_of(**DEEPSPEED, activation="swiglu", mlp_multiple_of=32)["activation"] == "swiglu"
    mixed = read_neox({"s.yml": SMALL | EIGHT | {"activation": "swiglu", "moe_expert_interval": 2}})
    (problem,) = [item for item in mixed.problems if item.key == "model.activation"]
    assert "experts have no gate, its other MLPs have one" in problem.text


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        (MEGABLOCKS, "model.moe.balance_loss", "without its gradient"),
        (MEGABLOCKS, "model.moe.expert_size", "whose default is 4096"),
        (DROPPING, "model.moe.group", "a rank's micro-batch"),
        (DEEPSPEED, "model.moe.residual", "GPT-NeoX's default is true"),
        (DEEPSPEED | {"moe_top_k": 2}, "model.moe.top_k", "Gumbel noise"),
        (EIGHT | {"gpt_j_residual": True}, "model.parallel_residual", "drops the attention"),
        (EIGHT | {"model_parallel_size": 2}, "model.moe.split_over_tp", "part of every expert"),
        (MAMBA | {"pos_emb": None}, "model.pos_emb", "makes it model.family=mamba"),
        (GMLP, "model.gmlp.residual", "no residual connection"),
        (MAMBA | {"mamba_use_bias_in_linears": True}, "model.mamba.bias", "time steps and sel"),
        (MAMBA | {"model_parallel_size": 2}, "parallel.tp", "which is another model"),
        (RWKV | {"norm": "rmsnorm"}, "model.layernorm_epsilon", "the epsilon 1e-08 of the others"),
    ],
)
def test_what_differs_is_said(options, key, text):
    assert any(text in item.text for item in read(**options).notes if item.key == key)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (EIGHT | {"moe_router_type": "hash"}, "unknown moe_router_type 'hash'; choose one of sink"),
        (EIGHT | {"moe_type": "tutel"}, "unknown moe_type 'tutel'; choose one of deepspeed, mega"),
        (DROPPING | {"moe_train_capacity_factor": 0}, "moe_train_capacity_factor 0 drops every"),
        (EIGHT | {"expert_interval": 1, "moe_expert_interval": 2}, "old and the new name of one"),
        (RWKV | {"dim_att": 66}, "dim_att 66 is not divisible by num_attention_heads 4"),
        (layers([["mamba"], 3]), "attention_config is for 3 layers, num_layers is 4"),
        (
            layers([["hyena"], 4]),
            "unknown attention type hyena .* bslongformer, .*gmlp, amlp, rwkv",
        ),
    ],
)
def test_what_is_refused(options, text):
    problems = read_neox({"s.yml": SMALL | options}).problems
    with pytest.raises(AssertionError, match=text):
        assert not problems, "; ".join(item.text for item in problems)


def test_options_that_no_layer_reads_are_listed():
    ignored = read(moe_top_k=2, moe_loss_coeff=0.1, moe_num_experts=1, dim_att=64).ignored
    assert ignored == {
        "no layer has experts": ["moe_loss_coeff", "moe_top_k"],
        "no layer is RWKV": ["dim_att"],
    }
    assert read(**MAMBA, **EIGHT, moe_top_k=2).ignored["no layer has experts"] == ["moe_top_k"]
    unread = read(**DEEPSPEED, moe_jitter_eps=0.1, moe_min_capacity=8, moe_glu=True).ignored
    assert unread["moe_type deepspeed never reads it; set model.moe.jitter"] == ["moe_jitter_eps"]
    assert unread["without moe_token_dropping no token is dropped"] == ["moe_min_capacity"]
    assert read(**EIGHT, moe_jitter_eps=0.1).ignored == {
        "only moe_router_type topk reads it": ["moe_jitter_eps"]
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (MAMBA, {"family": "mamba", "mamba.conv_bias": True, "mamba.bias": False}),
        (MAMBA | {"pos_emb": "rotary", "expansion_factor": 3}, {"mamba.inner_size": 192}),
        (
            MAMBA | {"mamba_use_bias_in_conv": False, "mamba_use_bias_in_linears": True},
            {"mamba.conv_bias": False, "mamba.bias": True},
        ),
        # Added to the embedding whatever the layers are, and so a transformer's.
        (
            MAMBA | {"pos_emb": "learned", "num_attention_heads": 12},
            {"family": "neox", "pattern": ["mamba"], "num_attention_heads": 1},
        ),
        (MAMBA | {"hidden_dropout": 0.1}, {"family": "neox", "pos_emb": "none"}),
        (RWKV, {"family": "rwkv6", "rwkv6.head_size": 16}),
        (RWKV | {"dim_att": 128}, {"rwkv6.head_size": 32, "rwkv6.attention_size": 128}),
        (RWKV | {"intermediate_size": 250}, {"rwkv6.ffn_size": 224}),
        (GMLP, {"family": "gmlp", "gmlp.residual": False, "gmlp.bias": False}),
        (GMLP | {"activation": "swiglu"}, {"gmlp.activation": "silu"}),
        (GMLP | {"max_position_embeddings": 64}, {"max_position_embeddings": 32}),
        (
            layers([["amlp"], "all"]) | {"gmlp_attn_dim": 32},
            {"family": "amlp", "gmlp.attention_size": 32},
        ),
        (
            layers([["mamba", "flash"], "all"]),
            {"family": "neox", "pattern": ["mamba", "attention"], "num_attention_heads": 4},
        ),
        (
            layers([["mamba"], 3], [["local"], 1]),
            {
                "pattern": ["mamba", "mamba", "mamba", "attention"],
                "attention_config": ["global", "global", "global", "local"],
            },
        ),
        (
            layers([["rwkv", "mamba"], "all"]),
            {"family": "neox", "pattern": ["rwkv6", "mamba"], "num_attention_heads": 1},
        ),
    ],
)
def test_layers_without_attention(options, expected):
    model = model_of(**options)
    assert {key: model[key] for key in expected} == expected


def test_a_family_without_attention_has_none_of_its_options():
    model = model_of(**MAMBA, activation="silu", gpt_j_residual=True, attention_dropout=0.1)
    assert set(model) == {
        *("family", "num_layers", "hidden_size", "max_position_embeddings", "norm"),
        *("layernorm_epsilon", "init_method", "output_layer_init_method", "init_method_std"),
        *("tie_word_embeddings", "vocab_size", "make_vocab_size_divisible_by"),
        *("mamba.conv_bias", "mamba.bias"),
    }
    ignored = read(**MAMBA, activation="silu", gpt_j_residual=True).ignored
    assert set(ignored["no layer has attention"]) == {
        *("activation", "gpt_j_residual", "num_attention_heads"),
    }


def test_over_a_preset_only_what_the_file_says_counts():
    def over(**options):
        reading = read_neox({"s.yml": options}, complete=False)
        assert reading.problems == []
        return flatten(reading.values.get("model", {}))

    assert over(moe_top_k=2) == {"moe.top_k": 2, "moe.scores": "softmax"}
    assert over(**layers([["mamba", "global"], "all"])) == {
        "pattern": ["mamba", "attention"],
        "attention_config": ["global"],
    }
