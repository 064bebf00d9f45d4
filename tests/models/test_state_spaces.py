"""Layers with a state of constant size: documents of a row, generation, precision, layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from castalia.checkpoint.hf import read_hf, write_hf
from castalia.core.errors import CheckpointError, ConfigError
from castalia.cost.divisibility import layout_problems
from castalia.distributed import ParallelConfig
from castalia.inference.torch_engine import TorchEngine
from castalia.models import (
    Decoder,
    build_model_config,
    family_of,
    flops_per_token,
    parameter_counts,
)
from castalia.models.init import start_weights
from castalia.models.state import RecurrentState
from castalia.optim import AdamWConfig, Rules
from castalia.recipes import load_config
from castalia.train.precision import gather_policy

SIZES = {"num_layers": 2, "hidden_size": 16, "vocab_size": 61}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"family": "mamba", "mamba": {"state_size": 4}},
    "mamba2": {
        "family": "mamba2",
        "mamba2": {"state_size": 4, "head_size": 4, "groups": 2, "chunk_size": 3},
    },
}


def make(name: str) -> Decoder:
    """A model with its start weights, the matrices larger."""
    config = build_model_config(SIZES | {"init_method_std": 0.3} | MODELS[name], "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights(parameter_name, parameter.shape))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_row_are_those_alone(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (1, 14), generator=torch.Generator().manual_seed(1))
    # The second document is shorter than the convolution.
    lengths = (5, 2, 7)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    weights = torch.randn(14, 16, generator=torch.Generator().manual_seed(2))
    packed = model(tokens, segments=segments)
    (packed[0] * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat([model(part) for part in tokens.split(lengths, 1)], 1)
    (alone[0] * weights).sum().backward()
    assert (packed - alone).abs().max() <= 1e-5
    for parameter_name, parameter in model.named_parameters():
        error = (gradients[parameter_name] - parameter.grad).abs().max()
        assert error <= 1e-5 * max(1, float(parameter.grad.abs().max())), parameter_name
    assert (model(tokens) - packed).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_state_continues_a_row_and_does_not_grow(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        for first in (1, 2, 3, 8):
            state = model.new_state(2, 13)
            sizes = [{n: t.shape for n, t in layer.kept.items()} for layer in state.layers]
            parts = [model(tokens[:, :first], state=state)]
            parts += [model(tokens[:, i : i + 1], state=state) for i in range(first, 11)]
            parts.append(model(tokens[:, 11:], state=state))
            assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5
            for layer, before in zip(state.layers, sizes, strict=True):
                assert isinstance(layer, RecurrentState)
                assert {n: t.shape for n, t in layer.kept.items()} == before
    assert not state.rewinds


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_continues_texts_of_several_lengths(name: str) -> None:
    engine = TorchEngine(make(name))
    slots = engine.slots(3, 16)
    assert not slots.rewinds
    texts = [[3, 4, 5], [7], [1, 2, 9, 4, 5, 6, 0]]
    logits = slots.feed([0, 1, 2], texts)
    for ids, found in zip(texts, logits, strict=True):
        assert (found - engine.logits(ids)[-1]).abs().max() <= 1e-5
    # A copy goes on by itself, and the tokens of one slot change no other.
    slots.copy(0, 1, 3)
    again = slots.feed([1, 0, 2], [[8], [9], [10]])
    for ids, found in zip(([3, 4, 5, 8], [3, 4, 5, 9], [*texts[2], 10]), again, strict=True):
        assert (found - engine.logits(ids)[-1]).abs().max() <= 1e-5


def test_ranks_gather_the_decays_in_fp32() -> None:
    words = ["precision=bf16", "model.max_position_embeddings=64"]
    policies = [gather_policy(load_config([name, *words])) for name in ("debug", "debug-mamba")]
    assert [policy.param_dtype for policy in policies] == [torch.bfloat16, None]
    works = [load_config([name, *words]).workload for name in ("debug", "debug-mamba2")]
    assert [work.gathers_narrow for work in works] == [True, False]


@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_decays_and_states_in_fp32(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state(2, 12, dtype=torch.bfloat16)
        with torch.no_grad():
            model(tokens, state=state)
        rounded = model(tokens)
    rounded.sum().backward()
    assert {layer.kept["ssm"].dtype for layer in state.layers} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < (rounded - exact).abs().max() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_model(name: str) -> None:
    config = make(name).config
    with torch.device("meta"):
        model = Decoder(config)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model.head(model(tokens)).sum().backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, 8)
    # A state costs the same at every position.
    assert flops_per_token(config, 8) == flops_per_token(config, 800)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_layers_have_the_same_gradients(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    gradients = []
    for how in (False, "full", "selective"):
        model.recompute = how
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))


def test_starts_are_those_of_gpt_neox() -> None:
    model = make("mamba")
    mixer = model.layers[1].mixer
    assert torch.equal(mixer.ssm.A_log, torch.arange(1, 5).float().log().expand(32, 4))
    assert mixer.ssm.D.eq(1).all()
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.01 < steps.max() <= 0.1
    rules = Rules(AdamWConfig(weight_decay=0.5), family_of(model.config).no_decay)
    decayed = {name for name, _ in model.named_parameters() if rules.rule(name).weight_decay}
    names = ("x", "z", "conv", "x_proj", "dt_proj", "out")
    inside = {f"layers.{i}.mixer.{name}.weight" for i in range(2) for name in names}
    assert decayed == {"embed.weight", *inside}


@pytest.mark.parametrize(("name", "place"), [("mamba", "dt_proj.bias"), ("mamba2", "ssm.dt_bias")])
def test_time_steps_start_within_their_bounds(name: str, place: str) -> None:
    bounds = {"dt_min": 0.01, "dt_max": 0.4, "dt_floor": 0.05}
    section = MODELS[name][name] | bounds
    config = build_model_config(SIZES | {"family": name, name: section}, "a test")
    shape = dict(make(name).named_parameters())[f"layers.0.mixer.{place}"].shape
    biases = start_weights(config, 0)(f"layers.0.mixer.{place}", shape)
    steps = torch.nn.functional.softplus(biases)
    # Log-uniform: those below the floor are lifted to it.
    assert steps.min() == pytest.approx(0.05, rel=1e-4)
    assert 0.1 < steps.max() <= 0.4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "mamba", "mamba2": {}}, "mamba2 is set, and all layers are mamba; remove it"),
        ({"family": "mamba2", "mamba2": {"head_size": 5}}, "inner_size 32 is not divisible by"),
        ({"family": "mamba2", "mamba2": {"head_size": 8, "groups": 3}}, "4 heads of 8 channels"),
        ({"family": "mamba", "mamba": {"state_size": 0}}, "state_size"),
        ({"family": "mamba2", "mamba2": {"head_size": 8, "dt_limit": [0.5, 0.1]}}, "limit"),
        ({"family": "mamba", "num_attention_heads": 4}, "num_attention_heads"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model_config(SIZES | values, "a test")


def test_layouts_that_do_not_fit_are_refused() -> None:
    def problems(family: str, section: dict[str, Any], **degrees: int) -> str:
        config = build_model_config(SIZES | {"family": family, family: section}, "a test")
        return "; ".join(layout_problems(config, 24, ParallelConfig(**degrees)))

    assert "inner_size 30 is not divisible by parallel.tp=4" in problems(
        "mamba", {"inner_size": 30}, tp=4
    )
    groups = {"head_size": 2, "groups": 2, "inner_size": 24}
    assert "has 12 heads, which parallel.tp=8 does not divide" in problems("mamba2", groups, tp=8)
    assert "groups 2 and parallel.tp=3: one must be a multiple" in problems("mamba2", groups, tp=3)
    assert "family mamba reads each row from its beginning" in problems("mamba", {}, cp=2)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path, make("mamba").state_dict(), make("mamba").config, end_ids=[0])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    config |= {"num_heads": 4, "head_dim": 8, "n_groups": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Mamba2 key map: keys that no rule knows"):
        read_hf(tmp_path)
