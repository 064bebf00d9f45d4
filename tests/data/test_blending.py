"""The blend in lanes against the rule as it is written."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.core.errors import ConfigError
from castalia.data import DataConfig, blend
from castalia.data.blending import in_lanes

WEIGHTS = st.one_of(
    st.lists(st.integers(0, 6).map(float), min_size=2, max_size=9),
    st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=9),
    st.lists(st.sampled_from([1e-6, 1e-3, 1.0, 0.5, 0.25]), min_size=2, max_size=6),
).filter(lambda weights: sum(weights) > 0)


def as_published(weights, size):
    """helpers.cpp:34-89 of GPT-NeoX, told step by step."""
    total = float(np.sum(np.array(weights, dtype=np.float64)))
    shares = [weight / total for weight in weights]
    counts = [0] * len(shares)
    picks = []
    numbers = []
    for place in range(size):
        x = max(float(place), 1.0)
        best = 0
        most = shares[0] * x - counts[0]
        for d in range(1, len(shares)):
            if shares[d] * x - counts[d] > most:
                best = d
                most = shares[d] * x - counts[d]
        picks.append(best)
        numbers.append(counts[best])
        counts[best] += 1
    return picks, numbers


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, size=st.integers(0, 400))
def test_equals_the_published_rule(weights, size):
    picks, numbers = blend(weights, size)
    assert (picks.tolist(), numbers.tolist()) == as_published(weights, size)


@settings(deadline=None, max_examples=100)
@given(
    weights=WEIGHTS, size=st.integers(1, 600), length=st.integers(1, 60), warmup=st.integers(0, 60)
)
def test_lanes_of_any_length_give_the_same(weights, size, length, warmup):
    shares = np.array(weights) / np.sum(np.array(weights))
    picks = in_lanes(shares, size, length=max(length, warmup), warmup=warmup)
    assert picks.tolist() == as_published(weights, size)[0]


@pytest.mark.parametrize(
    "weights", [[0.5, 0.3, 0.2], [1.0] * 7, [0.9, 0.0999, 1e-4], [3, 0, 2, 2, 1]]
)
def test_large_enough_for_lanes(weights):
    picks, numbers = blend(weights, 30_000)
    expected = as_published(weights, 30_000)
    assert picks.tolist() == expected[0]
    assert numbers.tolist() == expected[1]


def test_one_source_is_counted_through():
    picks, numbers = blend([4.0], 5)
    assert (picks.tolist(), numbers.tolist()) == ([0] * 5, [0, 1, 2, 3, 4])


@pytest.mark.parametrize(("sources", "dtype"), [(254, np.uint8), (300, np.uint16)])
def test_width_of_the_source_number(sources, dtype):
    picks, _ = blend([1.0] * sources, 2 * sources)
    assert picks.dtype == dtype
    assert np.bincount(picks).tolist() == [2] * sources


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan"), 1.0]])
def test_weights_that_say_nothing(weights):
    with pytest.raises(ConfigError, match="weights of a blend"):
        blend(weights, 3)


@pytest.mark.parametrize("weights", [[1, math.nan], [math.nan, 1], [1, math.inf], [0, 0], [2, -1]])
def test_weights_that_are_no_shares_are_refused_with_the_config(weights):
    with pytest.raises(ValueError, match="weights must be finite numbers >= 0 and not all 0"):
        DataConfig(train=["a", "b"], weights=weights)
