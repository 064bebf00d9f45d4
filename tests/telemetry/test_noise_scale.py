"""The gradient noise scale against gradients of a known mean and covariance."""

import math

import numpy as np
import pytest

from castalia.telemetry.noise_scale import Averages, Estimate, estimate

MEAN = np.array([0.5, -1.0, 0.25, 0.0])
DEVIATIONS = np.array([3.0, 1.0, 2.0, 4.0])
SQUARE = float(MEAN @ MEAN)
TRACE = float(DEVIATIONS @ DEVIATIONS)


def test_expected_norms_give_both_terms_exactly():
    """E|G_B|^2 = |G|^2 + tr(S) / B, put in, comes out."""
    found = estimate(8, SQUARE + TRACE / 8, 96, SQUARE + TRACE / 96)
    assert found.gradient == pytest.approx(SQUARE, rel=1e-12)
    assert found.noise == pytest.approx(TRACE, rel=1e-12)


def test_the_scale_of_sampled_gradients():
    """Batches of 24 with 6 of them as the small one: the average finds tr(S) / |G|^2 = 22.9."""
    random = np.random.default_rng(0)
    averages = Averages(0.999)
    for _ in range(20000):
        rows = MEAN + DEVIATIONS * random.standard_normal((24, 4))
        small = float(np.square(rows[:6].mean(0)).sum())
        big = float(np.square(rows.mean(0)).sum())
        averages.add(estimate(6, small, 24, big))
    # The average has an effective 2,000 estimates, each with a relative error of about 2.
    assert averages.scale == pytest.approx(TRACE / SQUARE, rel=0.15)
    assert averages.gradient == pytest.approx(SQUARE, rel=0.1)
    assert averages.noise == pytest.approx(TRACE, rel=0.1)


def test_the_start_of_the_averages_cancels():
    averages = Averages(0.9)
    averages.add(Estimate(2.0, 50.0))
    assert averages.scale == pytest.approx(25)


def test_what_is_not_finite_or_not_positive():
    averages = Averages(0.9)
    assert math.isnan(averages.scale)
    averages.add(Estimate(-1.0, 50.0))
    assert math.isnan(averages.scale)
    averages.add(Estimate(math.inf, math.nan))
    assert averages.noise == pytest.approx(5.0)
