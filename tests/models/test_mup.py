"""μP: start values, rates and factors by width, as in the mup package; and models without it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import ConfigError
from castalia.formats.folded import folded
from castalia.formats.saved_model import SavedModel
from castalia.models import FAMILIES, Decoder, ModelConfig, build_model_config, family_of
from castalia.models.families.transformer import Transformer
from castalia.models.init import start_weights
from castalia.optim import AdamWConfig, Rules, width_rule
from castalia.optim.config import member_config
from castalia.recipes import load_config

SHAPE = {"num_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
TRANSFORMERS = [name for name in FAMILIES if isinstance(FAMILIES[name], Transformer)]
NARROW = 32
WIDE = 128


def config_of(width: int, mup: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    section = {"mup": {"base_width": NARROW, "base_head_dim": 8} | (mup or {})}
    return build_model_config(SHAPE | {"hidden_size": width} | section | values, "a test")


def make(config: ModelConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    weights = start_weights(config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
    return model


def logits(model: Decoder) -> torch.Tensor:
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.head(model(tokens))


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_at_the_base_width_nothing_changes(family: str) -> None:
    with_mup = config_of(NARROW, family=family)
    without = with_mup.model_copy(update={"mup": None})
    assert torch.equal(logits(make(with_mup)), logits(make(without)))
    names = [name for name, _ in Decoder(without).named_parameters()]
    rules = [
        Rules(AdamWConfig(), widths=width_rule(config, AdamWConfig()))
        for config in (with_mup, without)
    ]
    assert [rules[0].rule(name) for name in names] == [rules[1].rule(name) for name in names]


def decoders(family: str) -> dict[int, Decoder]:
    """Three widths, of which the mup package sees what grows."""
    # A gated MLP's default width is rounded, and grows by steps.
    return {
        width: Decoder(config_of(width, family=family, intermediate_size=3 * width))
        for width in (NARROW, 2 * NARROW, WIDE)
    }


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_rates_starts_and_factors_are_those_of_the_mup_package(family: str) -> None:
    mup = pytest.importorskip("mup")
    models = decoders(family)
    wide = models[WIDE]
    # Without its check that the head is its own class, and without its start values.
    mup.set_base_shapes(
        wide, models[NARROW], delta=models[2 * NARROW], rescale_params=False, do_assert=False
    )
    theirs = mup.MuAdamW(wide.parameters(), lr=1.0, weight_decay=0.5)
    groups = {p: group for group in theirs.param_groups for p in group["params"]}
    rules = Rules(AdamWConfig(weight_decay=0.5), widths=width_rule(wide.config, AdamWConfig()))
    hidden = 0
    for name, parameter in wide.named_parameters():
        rule = rules.rule(name)
        group = groups[parameter]
        assert (rule.lr_scale, rule.weight_decay) == (group["lr"], group["weight_decay"]), name
        hidden += rule.lr_scale < 1
    assert hidden == sum(p.infshape.ninf() == 2 for p in wide.parameters()) > 0
    readout = mup.MuReadout(WIDE, 61)
    readout.weight.infshape = wide.head_weight.infshape
    assert wide.config.output_factor == 1 / readout.width_mult()


def test_sgd_has_the_rates_of_the_mup_package_and_others_their_own() -> None:
    mup = pytest.importorskip("mup")
    models = decoders("neox")
    wide = models[WIDE]
    mup.set_base_shapes(
        wide, models[NARROW], delta=models[2 * NARROW], rescale_params=False, do_assert=False
    )
    theirs = mup.MuSGD(wide.parameters(), lr=1.0, weight_decay=0.5)
    groups = {p: group for group in theirs.param_groups for p in group["params"]}
    optim = member_config("sgd", {"weight_decay": 0.5})
    rules = Rules(optim, widths=width_rule(wide.config, optim))
    for name, parameter in wide.named_parameters():
        rule = rules.rule(name)
        group = groups[parameter]
        assert (rule.lr_scale, rule.weight_decay) == (group["lr"], group["weight_decay"]), name
    # Worked out, and tried with the coordinate check: no package has these.
    expected = {"muon": (0.5, 1.0), "adafactor": (0.5, 1.0), "madgrad": (0.25, 2.0)}
    for kind, factors in expected.items():
        optim = member_config(kind, {})
        rules = Rules(optim, widths=width_rule(wide.config, optim))
        names = ("layers.1.mlp.up.weight", "unembed.weight")
        assert tuple(rules.rule(name).lr_scale for name in names) == factors
    optim = member_config("muon", {"scale": "original"})
    rules = Rules(optim, widths=width_rule(wide.config, optim))
    assert rules.rule("layers.1.mlp.up.weight").lr_scale == 1.0


INITS = ("normal", "small_init", "orthogonal", "xavier_uniform", "wang_init")


@pytest.mark.parametrize("method", INITS)
def test_start_values_by_width(method: str) -> None:
    """Between two widths the deviation falls with the root of the inputs; elsewhere it stays."""
    options = {"init_method": method, "output_layer_init_method": method}
    draws = {}
    for width in (NARROW, WIDE):
        config = config_of(width, {"init_scale": 1.5}, **options)
        weights = start_weights(config, 3)
        draws[width] = {
            name: weights(name, p.shape).std().item()
            for name, p in Decoder(config).named_parameters()
            if p.dim() == 2
        }
    for name, there in draws[NARROW].items():
        expected = 0.5 if family_of(config).is_hidden(config, name) else 1.0
        assert draws[WIDE][name] / there == pytest.approx(expected, rel=0.05), name
    plain = config_of(NARROW, **options).model_copy(update={"mup": None})
    value = start_weights(plain, 3)("embed.weight", (128, NARROW)).std().item()
    assert draws[NARROW]["embed.weight"] == pytest.approx(1.5 * value, rel=1e-5)


FACTORS = {"attention_mult": 0.7, "output_mult": 3.0, "embedding_mult": 5.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "tied": {"tie_word_embeddings": True, "embedding_multiplier": 2.0},
    "tied, no weights": {"tie_word_embeddings": True, "norm": "non_parametric_layernorm"},
    "grouped": {"family": "llama", "num_kv_heads": 2, "attention_bias": True},
    "head norm": {"qk_norm": "head", "family": "qwen2", "qkv_bias": False},
    "neox norm": {"qk_norm": "neox"},
    "scalenorm": {"norm": "scalenorm", "tie_word_embeddings": True},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 10},
    "learned": {"family": "gpt2"},
    "alibi": {"family": "falcon", "pos_emb": "alibi"},
    "post": {"family": "olmo2"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_factors_go_into_the_weights(option: str) -> None:
    factors = FACTORS | ({"rp_embedding_mult": 2.0} if option == "rpe" else {})
    model = make(config_of(WIDE, factors, **OPTIONS[option]))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms with numbers of their own.
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tensors = StoredTensors({name: p.detach() for name, p in model.named_parameters()})
    plain = folded(SavedModel(Path(), model.config, tensors, None, None))
    assert plain.config.mup is None and plain.tensors.keys() == tensors.keys()
    other = Decoder(plain.config)
    other.load_state_dict(dict(plain.tensors))
    here = logits(model)
    assert (logits(other) - here).abs().max() < 2e-5 * here.abs().max()
    # The factors matter.
    unfolded = model.config.model_copy(update={"mup": None})
    other = Decoder(unfolded)
    other.load_state_dict(dict(tensors))
    assert (logits(other) - here).abs().max() > 0.01 * here.abs().max()
    # A part of a tensor is multiplied like the whole.
    part = (slice(3, 7),)
    name = "embed.weight"
    rows = plain.tensors.stored(name)[(*part, slice(0, WIDE))]
    assert torch.equal(rows, plain.tensors[name][part])


def test_a_norm_without_weights_leaves_no_place() -> None:
    config = config_of(WIDE, qk_norm="head", norm="non_parametric_layernorm")
    tensors = StoredTensors({name: p.detach() for name, p in make(config).named_parameters()})
    source = SavedModel(Path(), config, tensors, None, None)
    assert folded(source) is source


def test_a_head_of_zeros() -> None:
    assert not logits(make(config_of(WIDE, {"zero_readout": True}))).any()
    with pytest.raises(ConfigError, match="zero_readout needs a head of its own"):
        config_of(WIDE, {"zero_readout": True}, tie_word_embeddings=True)


def test_what_is_written_and_refused() -> None:
    assert "mup" not in load_config(["debug"]).model.model_dump(mode="json")
    config = load_config(["debug", "model.mup.base_width=64"])
    assert config.model.model_dump(mode="json")["mup"]["base_width"] == 64
    with pytest.raises(ConfigError, match="soap does not say how its learning rates"):
        load_config(["debug", "model.mup.base_width=64", "optim.kind=soap"])


def test_mup_at_the_top_is_short_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: debug\nmup: {base_width: 64}\n")
    config = load_config([str(tmp_path / "a.yaml"), "mup.attention_mult=0.5"])
    assert config.model.mup is not None
    assert (config.model.mup.base_width, config.model.mup.attention_mult) == (64, 0.5)
    assert load_config([str(tmp_path / "a.yaml"), "mup=null"]).model.mup is None
    with pytest.raises(ConfigError, match=r"model.mup.base: unknown key"):
        load_config(["debug", "mup.base=64"])
