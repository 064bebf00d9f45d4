"""Choices of experts, capacities and losses against literal loops; products against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.experts.auxiliary import balance_loss, shares_of, z_loss
from castalia.experts.config import MoeConfig
from castalia.experts.decision import decide, load_of, room_of
from castalia.experts.layer import Experts
from castalia.experts.products import SegmentProduct
from castalia.experts.router import scores_of, weights_of
from castalia.experts.sinkhorn import balanced_logs

E = 5
S = 23


def outputs() -> Tensor:
    """Router outputs of three groups that prefer the first experts."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, S, E, generator=generator) * 2 - torch.arange(E) * 0.7


def literal_gating(
    logits: Tensor, k: int, factor: float, least: int, uniform: Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    """Experts and weights of each token of one group, 0 where dropped: DeepSpeed's three gatings,
    token by token."""
    tokens = len(logits)
    gates = logits.double().softmax(-1).tolist()
    room = max(math.ceil(torch.tensor(factor * k) * (tokens / E)), least)
    chosen = [sorted(range(E), key=lambda e, t=t: -gates[t][e])[:k] for t in range(tokens)]
    if k == 2 and uniform is not None:
        for t in range(tokens):
            noisy = {
                e: float(logits[t, e]) - math.log(-math.log(float(uniform[t, e])))
                for e in range(E)
                if e != chosen[t][0]
            }
            chosen[t][1] = max(noisy, key=lambda e: noisy[e])
    kept = [[False] * k for _ in range(tokens)]
    for e in range(E):
        asked = [(t, j) for j in range(k) for t in range(tokens) if chosen[t][j] == e]
        if k == 1 and uniform is not None:
            asked.sort(key=lambda place: -float(uniform[place[0], e]))
        if k > 2:
            asked.sort(key=lambda place: -gates[place[0]][e])
        for t, j in asked[:room]:
            kept[t][j] = True
    weights = [[gates[t][e] * kept[t][j] for j, e in enumerate(chosen[t])] for t in range(tokens)]
    if k > 1:
        weights = [[w / max(sum(row), 1e-7) for w in row] for row in weights]
    return chosen, weights


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_a_capacity_drops_the_tokens_that_deepspeed_drops(k, training):
    key = "capacity_factor" if training else "eval_capacity_factor"
    config = MoeConfig(experts=E, top_k=k, normalize=k > 1, min_capacity=2, **{key: 1.1})
    logits = outputs()
    uniform = None
    if training:
        uniform = torch.rand(3, S, E, generator=torch.Generator().manual_seed(2))
    decision = decide(config, logits, noise_GSE=uniform, training=training)
    assert decision.kept is not None
    assert 0 < (~decision.kept).sum() < decision.kept.numel() / 2
    assert decide(config, logits, training=not training).kept is None
    weights = weights_of(config, scores_of(config, logits), decision.chosen, decision.kept)
    for group in range(3):
        own = None if uniform is None else uniform[group]
        chosen, expected = literal_gating(logits[group], k, 1.1, 2, own)
        assert decision.chosen[group].tolist() == chosen
        assert torch.allclose(weights[group].double(), torch.tensor(expected).double(), atol=1e-6)
    # The groups do not see each other.
    first = decide(
        config, logits[:1], noise_GSE=None if uniform is None else uniform[:1], training=training
    )
    assert torch.equal(first.chosen[0], decision.chosen[0])
    assert torch.equal(first.kept[0], decision.kept[0])


def test_room_is_rounded_as_in_deepspeed_and_has_a_least():
    config = MoeConfig(experts=5, top_k=1, min_capacity=4)
    # In float64 this is 11.000000000000002.
    assert room_of(config, 50, 1.1) == 11
    assert room_of(config, 10, 1.0) == 4
    assert room_of(config, 3, 1.0) == 3


def test_sinkhorn_balances_tokens_and_experts_within_a_percent():
    logits = outputs()
    plan = balanced_logs(logits).exp()
    assert (plan.sum(1) * E - 1).abs().max() < 0.01
    assert (plan.sum(2) * S - 1).abs().max() < 0.01
    # The plan of a group does not depend on the others of the pass.
    assert torch.equal(balanced_logs(logits[1:2]).exp()[0], plan[1])
    # It is exp(logits) with scaled rows and columns: what neither explains is nothing.
    logs = plan.double().log() - logits.double()
    mixed = logs - logs.mean(1, keepdim=True) - logs.mean(2, keepdim=True)
    assert (mixed + logs.mean((1, 2), keepdim=True)).abs().max() < 1e-4
    config = MoeConfig(experts=E, router="sinkhorn")
    trained = load_of(decide(config, logits, training=True).chosen, E).amax(1)
    plain = load_of(decide(config, logits).chosen, E).amax(1)
    assert (trained < plain - 0.1).all()
    # Also where one expert is e^50 times likelier than the others for all tokens.
    collapsed = logits + torch.tensor([50.0, 0, 0, 0, 0])
    assert (load_of(decide(config, collapsed).chosen, E)[:, 0] == 1).all()
    assert torch.allclose(balanced_logs(collapsed).exp(), plan, atol=1e-4)
    assert balanced_logs(logits[:, :1] * 500).isfinite().all()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_bias_moves_the_choice_and_not_the_weights(scores):
    config = MoeConfig(experts=E, top_k=2, scores=scores, bias_rate=0.1, scale=2.0)
    logits = outputs()
    decision = decide(config, logits, torch.tensor([0.0, 0, 0, 0, 9]))
    assert decision.kept is None
    assert (decision.chosen[..., 0] == 4).all()
    weights = weights_of(config, scores_of(config, logits), decision.chosen, None)
    plain = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    assert torch.allclose(weights, 2 * plain.gather(-1, decision.chosen))


def test_losses_are_those_of_a_loop():
    config = MoeConfig(experts=E, top_k=2, scores="sigmoid")
    logits = outputs()
    chosen = decide(config, logits).chosen
    shares = shares_of(config, logits.sigmoid())
    expected = 0.0
    squares = 0.0
    for group in range(3):
        for e in range(E):
            load = float((chosen[group] == e).sum()) / (2 * S)
            expected += E * load * sum(float(shares[group, t, e]) for t in range(S)) / S
        squares += sum(float(logits[group, t].exp().sum().log()) ** 2 for t in range(S)) / S
    assert float(balance_loss(shares, load_of(chosen, E), S)) == pytest.approx(expected, rel=1e-5)
    assert float(z_loss(logits, S)) == pytest.approx(squares, rel=1e-5)
    # In balance it is 1 a row.
    even = torch.full((1, S, E), 1 / E)
    assert float(balance_loss(even, even[:, 0], S)) == pytest.approx(1)


def loop_of(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """The same sum, token by token and expert by expert."""
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for j, e in enumerate(chosen[t].tolist()):
            if not kept[t, j]:
                continue
            up = experts.up[e] @ x[t] + experts.up_bias[e]
            gate = experts.gate[e] @ x[t] + experts.gate_bias[e]
            inner = F.silu(gate) * up
            total = total + weights[t, j] * (experts.down[e] @ inner + experts.down_bias[e])
        out.append(total)
    return torch.stack(out)


def test_experts_are_a_loop_over_tokens_with_drops_and_without():
    torch.manual_seed(0)
    experts = Experts(E, 16, 8, F.silu, gated=True, bias=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(S, 16, requires_grad=True)
    # The last expert has no token at all.
    chosen = torch.rand(S, E - 1).topk(2).indices
    weights = torch.rand(S, 2, requires_grad=True)
    some = torch.rand(S, 2) < 0.8
    inputs = [x, weights, *experts.parameters()]
    for kept in (None, some):
        out = experts(x, chosen, weights, kept)
        expected = loop_of(
            experts, x, chosen, weights, torch.ones_like(some) if kept is None else kept
        )
        assert (out - expected).abs().max() < 1e-5
        direction = torch.randn_like(out)
        found = torch.autograd.grad((out * direction).sum(), inputs)
        right = torch.autograd.grad((expected * direction).sum(), inputs)
        for one, other in zip(found, right, strict=True):
            assert (one - other).abs().max() < 1e-5
            assert other.abs().max() > 1e-3


def test_products_of_segments_are_those_of_torchs_kernel():
    torch.manual_seed(0)
    counts = torch.tensor([4, 0, 9, 3, 0])
    rows = torch.randn(16, 16, requires_grad=True)
    weight = torch.randn(E, 8, 16, requires_grad=True)
    ours = SegmentProduct.apply(rows, weight, counts)
    kernel = F.grouped_mm(rows, weight.mT, offs=counts.cumsum(0).int())
    assert torch.allclose(ours, kernel, atol=1e-5)
    direction = torch.randn_like(ours)
    found = torch.autograd.grad((ours * direction).sum(), (rows, weight))
    right = torch.autograd.grad((kernel * direction).sum(), (rows, weight))
    assert all(
        torch.allclose(one, other, atol=1e-5) for one, other in zip(found, right, strict=True)
    )
