"""Filters and draws against the formulas, written out plainly."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.inference.sampling import (
    Sampling,
    distribution,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    next_tokens,
    warped,
)

NUMBERS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=12)


def kept(logits: torch.Tensor) -> set[int]:
    """Columns that are not ruled out."""
    return {i for i, value in enumerate(logits[0].tolist()) if value > -math.inf}


@given(NUMBERS, st.integers(0, 14))
@settings(max_examples=200, deadline=None)
def test_top_k_keeps_what_ties_with_the_kth(values: list[float], k: int) -> None:
    smallest = sorted(values, reverse=True)[k - 1] if 0 < k <= len(values) else -math.inf
    assert kept(keep_top_k(torch.tensor([values]), k)) == {
        i for i, v in enumerate(values) if v >= smallest
    }


@given(NUMBERS, st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_top_p_keeps_the_token_that_reaches_p(values: list[float], p: float) -> None:
    weights = [math.exp(v) for v in values]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    want, mass = set(), 0.0
    for i in order:
        want.add(i)
        mass += weights[i] / sum(weights)
        if abs(mass - p) < 1e-6:
            return  # rounding decides
        if mass > p:
            break
    assert kept(keep_top_p(torch.tensor([values]), p)) == want


FILTERS: list[tuple[Callable[..., torch.Tensor], str, list[Any]]] = [
    (keep_top_k, "TopKLogitsWarper", [1, 3, 40, 300]),
    (keep_top_p, "TopPLogitsWarper", [0.01, 0.5, 0.9, 0.999]),
    (keep_min_p, "MinPLogitsWarper", [0.001, 0.1, 0.5, 1.0]),
    (keep_typical_p, "TypicalLogitsWarper", [0.01, 0.2, 0.7, 0.95, 0.999]),
]


@pytest.mark.parametrize(("ours", "name", "values"), FILTERS, ids=[name for _, name, _ in FILTERS])
def test_filters_are_those_of_transformers(
    ours: Callable[..., torch.Tensor], name: str, values: list[Any]
) -> None:
    """Element by element, for flat and steep rows, with tokens ruled out, and with a least count of
    tokens that stay."""
    theirs = getattr(pytest.importorskip("transformers"), name)
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(30, 257, generator=generator) * torch.linspace(0.1, 8, 30)[:, None]
    logits[::3, 40:200] = -math.inf
    for value in values:
        for fewest in (1, 3):
            want = theirs(value, min_tokens_to_keep=fewest)(None, logits.clone())
            got = ours(logits, value, fewest)
            assert torch.equal(got, want), (value, fewest)
        assert torch.isfinite(ours(logits, value)).any(-1).all()
    assert torch.equal(ours(logits, 0), logits)


def test_the_order_of_the_filters_is_that_of_transformers() -> None:
    hf = pytest.importorskip("transformers")
    logits = 3 * torch.randn(20, 257, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02, typical_p=0.8)
    chain = hf.LogitsProcessorList(
        [
            hf.TemperatureLogitsWarper(0.7),
            hf.TopKLogitsWarper(50),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.02),
            hf.TypicalLogitsWarper(0.8),
        ]
    )
    assert torch.allclose(warped(logits, sampling), chain(None, logits.clone()), atol=1e-6, rtol=0)
    assert int(torch.isfinite(warped(logits, sampling)).sum(-1).min()) < 50


def test_of_equal_tokens_the_nucleus_is_as_many_as_reach_p() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == {0, 1}


def test_draws_follow_the_distribution() -> None:
    """20,000 draws, top-k 3 of the logits / 2, then top-p 0.8: shares within 4 standard errors."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    sampling = Sampling(temperature=2.0, top_k=3, top_p=0.8, seed=1)
    weights = {i: math.exp(logits[i].item() / 2.0) for i in (0, 4, 1)}
    whole = sum(weights.values())
    assert (weights[0] + weights[4]) / whole < 0.8 < 1
    want = torch.tensor([weights.get(i, 0.0) / whole for i in range(5)])
    generators = [torch.Generator().manual_seed(1)] * 20_000
    drawn = next_tokens(logits.expand(20_000, 5), sampling, generators)
    share = torch.bincount(drawn, minlength=5) / 20_000
    assert share[2] == 0 and share[3] == 0
    assert ((share - want).abs() <= 4 * (want * (1 - want) / 20_000).sqrt()).all()


def test_temperature_zero_takes_the_largest_whatever_the_filters_say() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert next_tokens(logits, Sampling(temperature=0.0, top_k=1, top_p=0.1), []).tolist() == [1, 0]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    sampling = Sampling(temperature=5e-324, seed=0)
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert next_tokens(logits, sampling, sampling.generators(1, logits.device)).tolist() == [1]
    extremes = Sampling(temperature=1e-5, repetition_penalty=0.01)
    assert distribution(logits / 0.01, extremes).tolist() == [[0.0, 1.0, 0.0]]


def test_a_small_nucleus_is_greedy() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, top_p=1e-6, seed=0)
    drawn = next_tokens(logits, sampling, sampling.generators(4, torch.device("cpu")))
    assert torch.equal(drawn, logits.argmax(-1))
