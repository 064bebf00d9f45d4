"""Models of RWKV 6 and 7: the literal recurrence, documents, states, stages, starts and costs."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.cost.divisibility import layout_problems
from castalia.distributed.config import ParallelConfig
from castalia.models import (
    Decoder,
    build_model_config,
    family_of,
    flops_per_token,
    parameter_counts,
)
from castalia.models.init import start_weights
from castalia.models.stages import split
from castalia.recurrent import rwkv6, rwkv7

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 1,
    "init_method_std": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "rwkv6": {"family": "rwkv6", "rwkv6": {"head_size": 8, "attention_size": 16}},
    "rwkv7": {"family": "rwkv7", "rwkv7": {"head_size": 8}},
    "hybrid": {
        "family": "llama",
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "pattern": ["rwkv6", "attention", "rwkv7", "rwkv7"],
        "rwkv6": {"head_size": 8},
        "rwkv7": {"head_size": 8},
    },
}
TOKENS = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(1))
LENGTHS = (6, 1, 12)
SEGMENTS = torch.repeat_interleave(torch.tensor([0, 3, 5]), torch.tensor(LENGTHS)).expand(2, -1)
"""Three documents of a row, the second a single token."""


def config_of(name: str, **options: Any) -> Any:
    """The config of a small model."""
    return build_model_config(SIZES | MODELS[name] | options, "a test")


def make(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model whose start weights are disturbed, so that nothing is zero."""
    config = config_of(name)
    model = Decoder(config)
    weights = start_weights(config, 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights(parameter_name, parameter.shape))
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return model.to(dtype)


def gradients(model: Decoder, out: Tensor) -> dict[str, Tensor]:
    """Of a fixed function of the hidden states, by parameter."""
    weights = torch.randn(out.shape[-2:], generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (out * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def require_equal(found: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    """Within `limit` of the largest number."""
    assert (found - expected).abs().max() <= limit * float(expected.detach().abs().max())


def require_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-5
) -> None:
    """All gradients within `limit` of their largest number."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).abs().max()
        assert difference <= limit * max(1e-4, float(value.abs().max())), name


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_literal_recurrence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [(make(name), 1e-5), (make(name, torch.float64), 1e-10)]
    outs = [model(TOKENS, segments=SEGMENTS) for model, _ in models]
    found = [gradients(model, out) for (model, _), out in zip(models, outs, strict=True)]
    monkeypatch.setattr(rwkv6, "wkv6", rwkv6.wkv6_by_token)
    monkeypatch.setattr(rwkv7, "wkv7", rwkv7.wkv7_by_token)
    # In fp64: of one rounding error the literal form has as much as the other.
    literal = make(name, torch.float64)
    expected = literal(TOKENS, segments=SEGMENTS)
    exact = gradients(literal, expected)
    for (_, limit), out, own in zip(models, outs, found, strict=True):
        require_equal(out, expected, limit)
        require_close(own, exact, limit)


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_row_are_those_alone(name: str) -> None:
    model = make(name, torch.float64)
    packed = model(TOKENS, segments=SEGMENTS)
    alone = torch.cat([model(part) for part in TOKENS.split(LENGTHS, 1)], 1)
    # Rotary tables are fp32.
    limit = 1e-6 if name == "hybrid" else 1e-10
    require_equal(packed, alone, limit)
    require_close(gradients(model, packed), gradients(model, alone), limit)
    assert (model(TOKENS) - packed).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_state_continues_a_row_and_does_not_grow(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        whole = model(TOKENS)
        for first in (1, 9):
            state = model.new_state(2, 19)
            parts = [model(TOKENS[:, :first], state=state)]
            parts += [model(TOKENS[:, i : i + 1], state=state) for i in range(first, 17)]
            parts.append(model(TOKENS[:, 17:], state=state))
            require_equal(torch.cat(parts, 1), whole)
    assert not state.rewinds
    layer = state.layers[-1]
    heads = layer.kept["wkv"].shape[1]
    assert layer.kept["wkv"].shape == (2, heads, 8, 8)
    assert layer.kept["time_shift"].shape == layer.kept["channel_shift"].shape == (2, 32)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_stages_of_a_pipeline_are_the_whole(name: str, recompute: bool) -> None:
    whole = make(name)
    out = whole(TOKENS, segments=SEGMENTS)
    expected = gradients(whole, out)
    for count in (2, 4):
        stages = [Decoder(whole.config, span) for span in split(4, count)]
        x = TOKENS
        for stage in stages:
            stage.load_state_dict(whole.state_dict(), strict=False)
            stage.recompute = recompute
            x = stage(x, segments=SEGMENTS)
            carried = 0 if name == "rwkv6" or stage.span.last else 32
            assert x.shape == (2, 19, 32 + carried)
        assert torch.equal(x, out)
        gradients(stages[-1], x)
        found = {n: p.grad for stage in stages for n, p in stage.named_parameters()}
        require_close({n: g for n, g in found.items() if g is not None}, expected)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_decays_and_states_in_fp32(name: str) -> None:
    model = make(name)
    exact = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state(2, 19, dtype=torch.bfloat16)
        with torch.no_grad():
            model(TOKENS, state=state)
        rounded = model(TOKENS)
    found = gradients(model, rounded)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert state.layers[-1].kept["wkv"].dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.3
    # Weights in bf16, as an engine holds them.
    half = make(name).to(torch.bfloat16)
    with torch.no_grad():
        assert (half(TOKENS) - exact).abs().max() < 0.5


@pytest.mark.parametrize("name", MODELS)
def test_costs_and_starts_cover_the_model(name: str) -> None:
    model = make(name)
    config = model.config
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    if name != "hybrid":
        assert flops_per_token(config, 8) == flops_per_token(config, 800)
    family = family_of(config)
    decayed = [
        parameter_name
        for parameter_name, _ in model.named_parameters()
        if not any(fnmatchcase(parameter_name, pattern) for pattern in family.no_decay)
    ]
    # As BlinkDL trains them: the matrices between two widths, embedding and head.
    assert all(parameter_name.endswith(".weight") for parameter_name in decayed)
    hidden = [n for n in decayed if family.is_hidden(config, n)]
    assert len(hidden) == len(decayed) - 2


def test_starts_are_those_of_the_peers() -> None:
    six = start_weights(config_of("rwkv6"), 0)
    place = torch.arange(32) / 32
    last = 1 - (place ** (1 / 4) + 0.3)
    torch.testing.assert_close(six("layers.3.att.mix_v", (32,)), last)
    share = torch.arange(16) / 15
    torch.testing.assert_close(six("layers.0.att.decay", (16,)), -6 + 5 * share**0.7)
    bonus = six("layers.3.att.bonus", (2, 8)).flatten()
    assert bonus[:3].tolist() == pytest.approx([1.0, 1 - 1 / 15 + 0.1, 1 - 2 / 15 - 0.1])
    assert float(six("layers.1.att.mix_in", (32, 160)).abs().max()) <= 1e-4
    seven = start_weights(config_of("rwkv7"), 0)
    assert seven("layers.0.att.norm.weight", (32,))[0] == pytest.approx(0.25**0.7)
    assert seven("layers.3.att.norm.weight", (32,))[0] == 1
    assert not seven("layers.2.att.output.weight", (32, 32)).any()
    decay = seven("layers.0.att.decay", (32,))
    # -6 + 0.5 less the zigzag's end, and 0.5 plus it.
    assert (decay[0], decay[-1]) == (pytest.approx(-8.0), pytest.approx(3.0))
    assert family_of(config_of("rwkv7")).start_of(config_of("rwkv7"), "embed.weight")


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"rwkv7.head_size 24 does not divide the 32 channels"):
        config_of("rwkv7", rwkv7={"head_size": 24})
    with pytest.raises(ConfigError, match=r"rwkv6.head_size 64 does not divide the 32 channels"):
        config_of("rwkv6", rwkv6=None)
    # 3.5 times as many are no multiple of 32.
    narrow = Decoder(config_of("rwkv6", hidden_size=8))
    assert parameter_counts(narrow.config).total == sum(p.numel() for p in narrow.parameters())
    with pytest.raises(ConfigError, match=r"rwkv6 is set, and all layers are rwkv7; remove it"):
        config_of("rwkv7", rwkv6={"head_size": 8})
    for name in MODELS:
        problems = layout_problems(config_of(name), 64, ParallelConfig(tp=2, cp=2))
        assert any("are not split over parallel.tp=2" in problem for problem in problems)
        assert any("parallel.cp=2" in problem for problem in problems)
