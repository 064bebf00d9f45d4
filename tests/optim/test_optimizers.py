"""Decay groups, the clip formula and AdamW against their closed forms."""

import pytest
import torch
from torch import nn

from castalia.distributed.gradients import clip_gradients, gradient_norm
from castalia.models.families import FAMILIES
from castalia.optim import AdamWConfig, Rules
from castalia.optim.config import member_config
from castalia.optim.loss_scale import make_scale
from castalia.optim.updater import Updater, parameter_groups, trained_parameters
from castalia.runs.config import LossScaleConfig

NEOX = FAMILIES["neox"].no_decay


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.unembed = nn.Linear(4, 5, bias=False)
        self.unembed.weight = self.embed.weight


def test_everything_but_biases_and_norms_decays_and_tied_weights_count_once():
    model = Tiny()
    groups = parameter_groups(trained_parameters(model), Rules(AdamWConfig(), NEOX))["adamw"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, others = (group["params"] for group in groups)
    assert {id(p) for p in decayed} == {id(model.embed.weight), id(model.up.weight)}
    assert len(decayed) == 2
    assert {id(p) for p in others} == {
        id(model.norm.weight),
        id(model.norm.bias),
        id(model.up.bias),
    }


def test_adamw_update_is_the_published_formula():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    config = AdamWConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    updater = Updater(model, Rules(config))
    w, m, v = 2.0, 0.0, 0.0
    for t, g in enumerate([0.3, -0.1, 0.7], start=1):
        model.weight.grad = torch.full((1, 1), g)
        updater.step(0.1 / t)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.95**t)
        w -= 0.1 / t * (m_hat / (v_hat**0.5 + 1e-8) + 0.5 * w)
        assert model.weight.item() == pytest.approx(w, rel=1e-5)


def test_set_updates_moves_the_bias_correction():
    model = nn.Linear(1, 1, bias=False)
    updater = Updater(model, Rules(AdamWConfig(lr=1.0, weight_decay=0.0)))
    updater.restore(41)
    model.weight.grad = torch.ones(1, 1)
    before = model.weight.item()
    updater.step(1.0)
    m_hat, v_hat = 0.1 / (1 - 0.9**42), 0.05 / (1 - 0.95**42)
    assert before - model.weight.item() == pytest.approx(m_hat / v_hat**0.5, rel=1e-4)


@pytest.mark.parametrize("limit", [0.5, 100.0, None])
def test_clip_coefficient(limit):
    model = nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0, 12.0]])
    norm = gradient_norm(model)
    assert norm.item() == pytest.approx(13.0)
    clip_gradients(model.parameters(), float(norm), limit)
    coefficient = 1.0 if limit is None else min(1.0, limit / (13.0 + 1e-6))
    assert model.weight.grad.flatten().tolist() == pytest.approx(
        [3 * coefficient, 4 * coefficient, 12 * coefficient]
    )


def test_loss_scale_follows_the_neox_state_machine():
    scale = make_scale(
        LossScaleConfig(initial_power=12, window=3, hysteresis=2, minimum=1024), "fp16"
    )
    values = []
    for overflow in [True, True, False, False, False, True, True, True, True]:
        scale.update(overflow)
        values.append(scale.value)
    # The first overflow only uses up patience; three clean steps double the scale and restore it.
    assert values == [4096, 2048, 2048, 2048, 4096, 4096, 2048, 1024, 1024]


def test_loss_scale_survives_a_resume_and_gives_up_after_fifty():
    scale = make_scale(LossScaleConfig(), "fp16")
    scale.update(True)
    other = make_scale(LossScaleConfig(), "fp16")
    other.load_state_dict(scale.state_dict())
    assert other == scale
    with pytest.raises(Exception, match="overflowed in 50 consecutive steps"):
        for _ in range(50):
            other.update(True)


def test_no_scale_without_fp16():
    scale = make_scale(LossScaleConfig(), "bf16")
    assert not scale.enabled and scale.value == 1.0


@pytest.mark.parametrize("kind", ["muon", "soap", "adafactor", "sm3"])
def test_a_stack_of_experts_trains_and_muon_takes_each_matrix_by_itself(kind):
    torch.manual_seed(0)
    start = torch.randn(9, 4, 6)
    gradients = torch.randn(3, 9, 4, 6)
    config = member_config(kind, {"weight_decay": 0.1})
    # As nine matrices of a block, and as one stack.
    apart = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(9))})
    stacked = Stack()
    with torch.no_grad():
        stacked.layers[0].mlp.experts.up.copy_(start)
        for layer, matrix in zip(apart["layers"], start, strict=True):
            layer.weight.copy_(matrix)
    updaters = [Updater(model, Rules(config)) for model in (apart, stacked)]
    for gradient in gradients:
        stacked.layers[0].mlp.experts.up.grad = gradient.clone()
        for layer, part in zip(apart["layers"], gradient, strict=True):
            layer.weight.grad = part.clone()
        for updater in updaters:
            updater.step(1e-2)
    found = stacked.layers[0].mlp.experts.up
    assert (found - start).abs().max() > 1e-3
    alike = all(
        torch.allclose(found[e], layer.weight, atol=1e-6) for e, layer in enumerate(apart["layers"])
    )
    # The others treat a stack as they treat a vector: with moments of its own shape.
    assert alike is (kind == "muon")


class Stack(nn.Module):
    """A stack of matrices under the name that experts have."""

    def __init__(self):
        super().__init__()
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.experts = nn.Module()
        layer.mlp.experts.up = nn.Parameter(torch.empty(9, 4, 6))
        self.layers = nn.ModuleList([layer])
