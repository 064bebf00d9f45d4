"""Every option of a transformer: parameters counted, gradients everywhere, and a cache that agrees
with whole rows."""

from typing import Any

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.models import FAMILIES, Decoder, build_model_config, parameter_counts
from castalia.models.families.transformer import Transformer
from castalia.models.init import start_weights

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}
TRANSFORMERS = [name for name in FAMILIES if isinstance(FAMILIES[name], Transformer)]
SHORT = {"max_position_embeddings": 16}
SERIAL = {"parallel_residual": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "multi-query": {"num_kv_heads": 1, "shared_norm": True},
    "wide heads": {"attention_head_dim": 16},
    "gated": {"activation": "swiglu", "mlp_bias": False},
    "rmsnorm": {"norm": "rmsnorm"},
    "partial rmsnorm": {"norm": "rmsnorm", "rmsnorm_partial": 0.25},
    "scalenorm": {"norm": "scalenorm"},
    "no parameters": {"norm": "non_parametric_layernorm"},
    "post": {"norm": "rmsnorm", "norm_placement": "post", "qk_norm": "width", **SERIAL},
    "head norm": {"qk_norm": "head", "num_kv_heads": 2},
    "neox norm": {"qk_norm": "neox"},
    "neox rmsnorm": {"qk_norm": "neox", "norm": "rmsnorm"},
    "bias": {"qkv_bias": False},
    "alibi": {"pos_emb": "alibi"},
    "falcon alibi": {"pos_emb": "alibi", "alibi_scaled": True, "alibi_numerics": "bf16"},
    "learned": {"pos_emb": "learned", "max_position_embeddings": 16, "learned_offset": 2},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 10},
    "none": {"pos_emb": "none"},
    "window": {"sliding_window": 5},
    "pattern": {"sliding_window": 5, "attention_config": ["global", "sliding"]},
    "local": {"attention_config": ["local"], "sparsity_config": {"block": 2}, **SHORT},
    "sparse heads": {
        "attention_config": ["sparse_fixed", "bigbird"],
        "sparsity_config": {
            "block": 2,
            "different_layout_per_head": True,
            "num_local_blocks": 2,
            "num_different_global_patterns": 2,
        },
        **SHORT,
    },
    "linear": {"rotary_pct": 1.0, "rope_scaling": {"kind": "linear", "factor": 2}},
    "ntk": {"rotary_pct": 1.0, "rope_scaling": {"kind": "ntk", "factor": 2}},
    "dynamic": {
        "rotary_pct": 1.0,
        "max_position_embeddings": 8,
        "rope_scaling": {"kind": "dynamic", "factor": 2},
    },
    "multipliers": {"embedding_multiplier": 2.0, "output_multiplier": 0.5},
}


def make(values: dict[str, Any]) -> Decoder:
    config = build_model_config(SHAPE | values, "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_trains_and_generates(option: str) -> None:
    model = make(OPTIONS[option])
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(model.config).total
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model.head(model(tokens))
    whole.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    with torch.no_grad():
        state = model.new_state(2, 12)
        parts = [model(tokens[:, :7], state=state)]
        parts += [model(tokens[:, i : i + 1], state=state) for i in range(7, 12)]
        # Dynamic frequencies follow the row in a whole pass, each token where a text grows.
        if option != "dynamic":
            assert (model.head(torch.cat(parts, 1)) - whole).abs().max() < 5e-6


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_family_computes_what_its_defaults_say(family: str) -> None:
    model = make({"family": family, "intermediate_size": 48})
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(model.config).total
    # The defaults are those of the class, and a config that repeats them is the same.
    again = build_model_config(model.config.model_dump(mode="json"), "a test")
    assert again == model.config
    assert model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_kv_heads": 3}, "num_attention_heads 4 is not divisible by num_kv_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_attention_heads 4"),
        ({"shared_norm": True, **SERIAL}, "shared_norm needs parallel_residual"),
        ({"norm_placement": "post"}, "norm_placement=post needs parallel_residual=false"),
        ({"rmsnorm_partial": 0.5}, "rmsnorm_partial needs norm=rmsnorm"),
        ({"attention_config": ["sliding"]}, "set sliding_window"),
        ({"attention_config": ["nearby"]}, "attention_config"),
        ({"pos_emb": "none", "rope_scaling": {"kind": "linear", "factor": 2}}, "rope_scaling"),
        ({"qk_norm": "neox", "num_kv_heads": 2}, "as many heads of both"),
        ({"rotary_pct": 0.25, "rope_scaling": {"kind": "ntk", "factor": 2}}, "raise rotary_pct"),
        ({"pos_emb": "rpe", "rpe_max_distance": 16}, "must be above half of rpe_num_buckets, 16"),
        ({"rotary_emb_base": 1.0}, "must be above 1"),
        ({"learned_offset": 2}, "learned_offset needs pos_emb=learned"),
    ],
)
def test_options_that_exclude_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model_config(SHAPE | values, "a test")


BF16 = {
    "width": {**SERIAL, "norm": "rmsnorm", "norm_placement": "post", "qk_norm": "width"},
    "head": {"qk_norm": "head", "num_kv_heads": 2},
    "neox": {"qk_norm": "neox"},
    "sinusoidal": {"pos_emb": "sinusoidal"},
}


@pytest.mark.parametrize("option", BF16)
def test_bf16_weights_and_autocast(option: str) -> None:
    tokens = torch.arange(12)[None]
    model = make(BF16[option])
    exact = model.head(model(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.head(model(tokens))
    rounded.float().sum().backward()
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    with torch.no_grad():
        halved = model.to(torch.bfloat16)(tokens)
    assert halved.dtype == torch.bfloat16 and halved.isfinite().all()


def test_dynamic_scaling_reads_a_text_alike_in_any_company() -> None:
    model = make(OPTIONS["dynamic"])
    text = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = model.new_state(1, 20)
        steps = torch.cat([model(text[:, i : i + 1], state=alone) for i in range(20)], 1)
        beside = model.new_state(2, 40)
        longer = torch.cat([text, text], 1)
        whole = model(torch.cat([longer, longer]), state=beside)[:1, :20]
    assert (steps - whole).abs().max() < 1e-5
    # It grows behind the trained length, up to which nothing is scaled.
    plain = make({"rotary_pct": 1.0, "max_position_embeddings": 8})
    with torch.no_grad():
        difference = (model(text) - plain(text)).abs().amax((0, 2))
        short = (model(text[:, :8]) - plain(text[:, :8])).abs().max()
    # Position 0 is not rotated.
    assert short == 0 < difference[1:].min()
