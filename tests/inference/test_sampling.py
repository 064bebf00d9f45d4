"""Filters and draws against the formulas, written out plainly."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.inference.sampling import Sampling, distribution, keep_top_k, keep_top_p, next_tokens

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
def test_top_p_keeps_the_token_that_crosses_p(values: list[float], p: float) -> None:
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
