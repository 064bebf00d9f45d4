"""Smoothing: no bias on a falling curve, in the middle and at the end."""

import numpy as np
import pytest

from castalia.analysis.smoothing import ENDING, WINDOWS, Smoother, ending, local_linear

STEPS = np.arange(1, 2001, dtype=float)
FALLING = 2 + 8 * STEPS**-0.4
"""A loss curve without noise: a power law, as in Kaplan et al. 2020, arXiv:2001.08361."""
SETTLED = 2 + np.where(STEPS < 1600, 1.0, 1.0 - (STEPS - 1600) / 800)
"""A plateau that falls in a straight line at the end, as under a learning rate that decays."""


@pytest.mark.parametrize("window", WINDOWS)
def test_a_falling_curve_is_not_biased(window):
    steps, fits = local_linear(STEPS, FALLING, window)
    truth = FALLING[steps.astype(int) - 1]
    # A trailing mean over an eighth of the steps is 0.036 above it from step 100 on.
    assert np.abs(fits - truth).max() < 0.004
    assert np.abs((fits - truth)[steps > 100]).max() < 0.002
    assert (steps[0], steps[-1]) == (1, 2000) and fits[0] == FALLING[0]


def test_noise_is_averaged_and_leaves_no_bias():
    errors = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.2, len(STEPS))
        steps, fits = local_linear(STEPS, FALLING + noise, 0.05)
        errors.append((fits - FALLING[steps.astype(int) - 1])[steps > 200])
    means = np.array(errors).mean(axis=1)
    assert abs(means.mean()) < 3 * 0.2 / np.sqrt(20 * 1800)
    assert np.std(errors) < 0.2 / 4


def test_a_straight_fall_at_the_end_is_followed_to_its_last_step():
    steps, fits = local_linear(STEPS, SETTLED, 0.1)
    assert fits[-1] == pytest.approx(SETTLED[-1], abs=1e-3)
    assert fits[steps > 1800] == pytest.approx(
        SETTLED[steps[steps > 1800].astype(int) - 1], abs=2e-3
    )


def test_the_ending_is_where_the_curve_ends():
    value, count = ending(STEPS, FALLING)
    assert value == pytest.approx(FALLING[-1], abs=1e-4) and count == 2000 * ENDING / 1.05 // 1 + 1
    _, fits = local_linear(STEPS, FALLING, ENDING)
    assert value == fits[-1]  # the number in the text is the end of the line
    assert ending(STEPS[:40], FALLING[:40])[1] == 10  # a short run: the last ten steps
    assert ending(STEPS[:1], FALLING[:1]) == (10.0, 1)
    assert ending(STEPS[:2], FALLING[:2])[0] == pytest.approx(FALLING[1])


def test_steps_may_be_sparse_and_begin_at_0():
    steps, fits = local_linear(np.array([0.0, 1, 10, 100]), np.array([4.0, 3, 2, 1]), 0.05)
    assert steps.tolist() == [0, 1, 10, 100]
    assert fits.tolist() == [3.5, 3.5, 2, 1]  # on a logarithm, step 0 stands at step 1


def test_a_curve_that_grows_is_smoothed_as_a_whole_one():
    generator = np.random.default_rng(0)
    steps = np.cumsum(generator.integers(1, 4, 900)).astype(np.float64)
    values = 3 + generator.normal(size=900)
    smooth = Smoother()
    counted: list[int] = []
    for count in (1, 3, 40, 400, 401, 900):
        for window in WINDOWS:
            whole = local_linear(steps[:count], values[:count], window)
            counted.append(len(smooth.kept(steps[:count], values[:count], window)))
            assert np.array_equal(smooth(steps[:count], values[:count], window), whole)
    assert max(counted) > 100
    # Another curve that begins alike.
    other = values.copy()
    other[500] += 1
    assert np.array_equal(smooth(steps, other, 0.05), local_linear(steps, other, 0.05))
