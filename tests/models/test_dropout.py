"""Dropout: its bits by place, its statistics, and what it leaves alone."""

import pytest
import torch

from castalia.models import Decoder, build_model_config
from castalia.models.context import Context, HeadShare
from castalia.models.init import start_weights
from castalia.models.parts.attention import attend, attend_plainly
from castalia.models.parts.dropout import Draws, drop_hidden, drop_probabilities, row_draws
from castalia.models.parts.masks import segment_mask
from castalia.models.parts.rotary import rope_tables

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.2,
}

GOLDEN_WORDS = [
    [1982548550, 978115875],
    [1296416591, 2608707644],
    [3007763870, 734245693],
]
GOLDEN_BITS = ["xxxx.xxx.x...xxx", ".....xxx.xxx.x.x", "x.xx...x.xxx..xx"]


def draws_of(
    rows: torch.Tensor, tokens: int, *, hidden: float = 0.0, attention: float = 0.0
) -> Draws:
    words = row_draws(1234, 5, rows)
    places = torch.arange(tokens)
    return Draws(words[:, 0], words[:, 1], places[None], places, (0, 1), 0, hidden, attention)


def make(**values) -> Decoder:
    config = build_model_config(SHAPE | values, "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
    return model


def test_the_bits_stay_those_of_earlier_versions():
    # A run that was begun with another version goes on with the same bits.
    assert row_draws(1234, 5, torch.tensor([0, 7, 2**40])).tolist() == GOLDEN_WORDS
    dropped = drop_hidden(torch.ones(1, 3, 16), draws_of(torch.tensor([3]), 3, hidden=0.5), 1)
    shown = ["".join(".x"[int(value > 0)] for value in row) for row in dropped[0]]
    assert shown == GOLDEN_BITS


def test_rates_scale_and_independence():
    rate = 0.3
    draws = draws_of(torch.arange(16), 64, hidden=rate)
    x = torch.ones(16, 64, 256)
    keep = drop_hidden(x, draws, 1) != 0
    # 262144 draws: four standard deviations of the share are 0.0036.
    assert abs(keep.float().mean() - (1 - rate)) < 0.0036
    assert torch.equal(drop_hidden(x, draws, 1)[keep], torch.full_like(x, 1 / (1 - rate))[keep])
    # Neither rows, tokens, channels nor places repeat each other: two independent patterns agree
    # in (1 - rate)^2 + rate^2 of the numbers.
    expected = (1 - rate) ** 2 + rate**2
    others = {
        "row": keep.roll(1, 0),
        "token": keep.roll(1, 1),
        "channel": keep.roll(1, 2),
        "transposed": keep[:, :, :64].transpose(1, 2).repeat(1, 1, 4),
        "place": drop_hidden(x, draws, 2) != 0,
        "layer": drop_hidden(x, draws.at(7), 1) != 0,
        "step": drop_hidden(x, step_draws(6, rate), 1) != 0,
    }
    for name, other in others.items():
        assert abs((keep == other).float().mean() - expected) < 0.006, name
    # No row, token or channel is dropped more than the others: five standard deviations.
    for dims, count in (((1, 2), 64 * 256), ((0, 2), 16 * 256), ((0, 1), 16 * 64)):
        spread = (keep.float().mean(dims) - (1 - rate)).abs().max()
        assert spread < 5 * (rate * (1 - rate) / count) ** 0.5


def step_draws(step: int, rate: float) -> Draws:
    words = row_draws(1234, step, torch.arange(16))
    return draws_of(torch.arange(16), 64, hidden=rate)._replace(low=words[:, 0], high=words[:, 1])


def test_probabilities_differ_by_head_query_and_key():
    draws = draws_of(torch.arange(8), 32, attention=0.25)
    keep = drop_probabilities(torch.ones(8, 4, 32, 32), draws) != 0
    assert abs(keep.float().mean() - 0.75) < 0.01
    for other in (keep.roll(1, 1), keep.roll(1, 2), keep.roll(1, 3), keep.transpose(2, 3)):
        # The diagonal of the transposed is its own.
        alike = (keep == other)[..., ~torch.eye(32, dtype=torch.bool)]
        assert abs(alike.float().mean() - (0.75**2 + 0.25**2)) < 0.015
    # A rank with the last two heads drops what the whole model drops of these.
    part = drop_probabilities(torch.ones(8, 2, 32, 32), draws._replace(head=2)) != 0
    assert torch.equal(part, keep[:, 2:])


def test_a_part_of_the_tokens_draws_as_the_whole():
    draws = draws_of(torch.arange(3), 8, hidden=0.4)
    whole = drop_hidden(torch.ones(3, 8, 16), draws, 2)
    part = drop_hidden(torch.ones(3, 4, 16), draws._replace(part=(1, 2)), 2)
    assert torch.equal(part, whole[:, 4:])
    # Context parallelism hands out early and late tokens.
    places = torch.tensor([[0, 1, 6, 7]])
    held = drop_hidden(torch.ones(3, 4, 16), draws._replace(tokens=places), 2)
    assert torch.equal(held, whole[:, places[0]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("extra", ["plain", "mask", "bias"])
def test_plain_attention_is_attention(kv_heads, extra):
    config = build_model_config(SHAPE | {"num_kv_heads": kv_heads, "rotary_pct": 0.5}, "a test")
    random = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, heads, 7, 8, generator=random, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    places = torch.arange(7)[None]
    context = Context(places, rope=rope_tables(config, places), heads=HeadShare())
    if extra == "mask":
        context = context._replace(mask=segment_mask(torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2)))
    if extra == "bias":
        context = context._replace(bias=torch.randn(1, 4, 7, 7, generator=random))
    ours = attend_plainly(q, k, v, context, draws_of(torch.arange(2), 7))
    theirs = attend(q, k, v, context)
    assert (ours - theirs).abs().max() < 2e-6
    weight = torch.randn(ours.shape, generator=random)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert (a - b).abs().max() < 5e-6


@pytest.mark.parametrize("values", [{}, {"norm_placement": "post", "parallel_residual": False}])
def test_recompute_draws_the_same_and_without_draws_nothing_is_dropped(values):
    tokens = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    model = make(**values)
    draws = row_draws(0, 1, torch.arange(3))
    kinds = {}
    for recompute in (False, True, "selective"):
        model.recompute = recompute
        model.zero_grad()
        out = model(tokens, draws=draws)
        model.head(out).square().sum().backward()
        kinds[recompute] = [p.grad.clone() for p in model.parameters()]
    assert all(map(torch.equal, kinds[False], kinds[True]))
    assert all(map(torch.equal, kinds[False], kinds["selective"]))
    model.recompute = False
    # A row draws alike in whatever micro-batch it is.
    alone = model(tokens[1:2], draws=draws[1:2])
    assert (alone - out[1:2]).abs().max() < 1e-5
    without = make(**values, hidden_dropout=0.0, attention_dropout=0.0)
    assert torch.equal(model(tokens), without(tokens))
    assert (out - model(tokens)).abs().max() > 0.1


def test_the_mean_over_many_draws_is_the_embedding():
    model = make(hidden_dropout=0.5, attention_dropout=0.0, num_layers=1)
    tokens = torch.zeros(512, 1, dtype=torch.int64)
    context = model.context(tokens, None, None, None)
    draws = row_draws(0, 0, torch.arange(512))
    with torch.no_grad():
        dropped = model.embedded(tokens, model.drawing(context, draws))
        whole = model.embedded(tokens[:1], context)
    assert (dropped.mean(0) - whole[0]).abs().max() < 5 * 0.02 * 3 / 512**0.5
    assert set((dropped / whole).round(decimals=4).unique().tolist()) == {0.0, 2.0}
