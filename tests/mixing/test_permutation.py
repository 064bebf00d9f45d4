"""Keyed permutations are bijective; systematic resampling is unbiased and within one row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.mixing.permutation import mix, mix_all, permute, quantise, resample, source_keys


def permutation(size, key):
    return permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))


def test_every_size_is_permuted():
    for size in [*range(1, 130), 255, 256, 257, 1000, 4099, 65_537]:
        assert np.array_equal(np.sort(permutation(size, mix(size))), np.arange(size)), size


def test_sizes_and_keys_differ_within_a_call():
    """Each element is mapped by its own size and key, whatever stands beside it."""
    sizes, keys = np.array([7, 1000, 1, 64, 7]), np.array([1, 2, 3, 4, 5], np.uint64)
    places = np.array([3, 999, 0, 63, 3])
    together = permute(places, sizes, keys)
    alone = [permute(places[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(5)]
    assert together.tolist() == alone
    assert (together < sizes).all()


def test_a_large_source_needs_no_memory():
    """Rows of a source with 2**52 rows."""
    places = np.arange(1000) * 2**42
    found = permute(places, np.full(1000, 2**52 - 1), np.full(1000, 9, np.uint64))
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0 and found.max() < 2**52 - 1
    assert abs(found.mean() / 2**51 - 1) < 0.1


@pytest.mark.parametrize("size", [5, 12, 100])
def test_every_place_goes_everywhere_equally_often(size):
    """Chi-squared over 20,000 keys for first, middle and last place, and neighbours' distance."""
    keys = mix_all(np.arange(20_000, dtype=np.uint64))
    for place in (0, size // 2, size - 1):
        found = permute(np.full(20_000, place), np.full(20_000, size), keys)
        other = permute(np.full(20_000, (place + 1) % size), np.full(20_000, size), keys)
        for drawn in (
            np.bincount(found, minlength=size),
            np.bincount((other - found) % size, minlength=size)[1:],
        ):
            expected = 20_000 / len(drawn)
            chi = ((drawn - expected) ** 2 / expected).sum()
            freedom = len(drawn) - 1
            assert chi < freedom + 8 * np.sqrt(2 * freedom), (place, chi)


def test_golden_order():
    """A run made today is repeated by any later version: these numbers never change."""
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first number of SplitMix64 from 0"
    assert mix_all(np.array([1], np.uint64))[0] == mix(1)
    assert permutation(10, 1234).tolist() == [0, 9, 6, 1, 3, 8, 7, 5, 2, 4]
    assert permutation(20, 1234).tolist() == [
        13,
        19,
        9,
        15,
        12,
        4,
        18,
        17,
        6,
        7,
        8,
        11,
        2,
        10,
        3,
        0,
        16,
        1,
        5,
        14,
    ]
    assert resample(np.array([3, 1, 4, 2]), 7, 1 << 63).tolist() == [2, 1, 3, 1]
    assert source_keys(1, ["web"])[0] == source_keys(1, ["code", "web"])[1]
    assert len(set(source_keys(1, ["a", "b"]).tolist() + source_keys(2, ["a", "b"]).tolist())) == 4


@settings(max_examples=200, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda x: sum(x) > 1e-3),
    rows=st.integers(1, 1 << 20),
    draw=st.integers(0, 2**64 - 1),
)
def test_counts_are_the_expectation_rounded(shares, rows, draw):
    units = quantise(np.array(shares) / sum(shares))
    counts = resample(units, rows, draw)
    expected = [rows * int(unit) / int(units.sum()) for unit in units]
    assert counts.sum() == rows
    assert all(int(e) <= c <= int(e) + 1 for c, e in zip(counts.tolist(), expected, strict=True))
    assert (counts[units == 0] == 0).all()


def test_counts_are_right_on_average():
    shares = np.array([0.5, 0.301, 0.15, 0.04, 0.009])
    drawn = sum(resample(quantise(shares), 8, mix(step)) for step in range(20_000)) / 20_000
    np.testing.assert_allclose(drawn, 8 * shares, atol=0.015)


def test_more_sources_than_rows():
    counts = sum(resample(quantise(np.full(5000, 1 / 5000)), 32, mix(step)) for step in range(5000))
    assert counts.sum() == 160_000
    assert counts.min() > 8 and counts.max() < 64, "32 each on average"


def test_the_last_bits_of_a_share_change_nothing():
    shares = np.random.default_rng(0).dirichlet(np.ones(20))
    nudged = shares * (1 + 1e-15)
    assert np.array_equal(quantise(shares), quantise(nudged))
