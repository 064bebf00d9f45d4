"""Learning progress: the slopes it finds, the shares that follow, and what it makes of noise."""

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.mixing import Stats, make_mixer

NAMES = ["steep", "gentle", "noise", "known"]


def observed(mixer, steps, fall, *, start=None, counts=(8, 8, 8, 8), wobble=0.0):
    """Show `steps` steps of losses that fall by `fall` nats for each e-fold of the steps."""
    random, tokens = np.random.default_rng(4), np.array(counts) * 128.0
    for step in range(1, steps + 1):
        means = np.array(start or [5.0, 5.0, 9.0, 0.5]) - np.array(fall) * np.log(step)
        mixer.observe(Stats(step, (means + random.normal(0, wobble, 4)) * tokens, tokens))
    return mixer


def test_slopes_of_a_straight_line():
    """Losses that are lines in ln t at even shares: the slopes come out."""
    mixer = observed(
        make_mixer("progress", sources=NAMES, caution=0.0, least=1.0), 200, [0.6, 0.2, 0.0, 0.0]
    )
    slopes, pooled = mixer.slopes()
    np.testing.assert_allclose(slopes, [0.6, 0.2, 0.0, 0.0], atol=1e-6)
    assert pooled == pytest.approx(0.2)
    np.testing.assert_allclose(mixer.weights(), 0.25)


def test_shares_by_hand():
    """Three steps of the formula, one source at a time, with numpy's weighted least squares."""
    options = {"memory": 2.0, "caution": 1.5, "enough": 2.0, "least": 0.2, "recent": 0.0}
    mixer = make_mixer("progress", sources=["a", "b"], **options)
    losses = np.array([[5.0, 4.0], [4.1, 3.9], [3.8, 3.6], [3.2, 3.7], [3.1, 3.4]])
    for step, means in enumerate(losses, 1):
        mixer.observe(Stats(step, means * 10, np.array([10.0, 10.0])))
    steps = np.arange(1, 6)
    x, w = np.log(steps / 2), (steps / 5) ** 2.0 / 2
    fitted = [np.polyfit(x, y, 1, w=np.sqrt(w)) for y in losses.T]
    pooled = -np.mean([slope for slope, _ in fitted])
    slopes = []
    for (slope, start), y in zip(fitted, losses.T, strict=True):
        left = (w * (y - slope * x - start) ** 2).sum() / w.sum()
        spread = (w * (x - (w * x).sum() / w.sum()) ** 2).sum() / w.sum()
        error = left / (spread * (w.sum() ** 2 / (w**2).sum() - 2))
        sure = pooled**2 / (pooled**2 + 1.5**2 * error)
        slopes.append(sure * -slope + (1 - sure) * pooled)
    np.testing.assert_allclose(mixer.slopes()[0], slopes)
    gate = np.array(slopes) / (2 * pooled)
    assert 0 < gate.min() < gate.max() < 1
    np.testing.assert_allclose(mixer.weights(), 0.8 * gate / gate.sum() + 0.1)


def test_a_share_that_fell_is_no_excuse():
    """A loss that follows its source's rate keeps its slope when that rate falls."""
    mixer = make_mixer("progress", sources=["a", "b"], caution=0.0, recent=200.0)
    for step in range(1, 301):
        part = 0.5 if step <= 150 else 0.1
        tokens = np.array([part, 1 - part]) * 1000
        means = 5 - 0.3 * np.log(step * tokens / 1000)
        mixer.observe(Stats(step, means * tokens, tokens))
    np.testing.assert_allclose(mixer.slopes()[0], 0.3, rtol=0.05)
    np.testing.assert_allclose(mixer.weights(), 0.5, atol=0.01)


def test_neither_noise_nor_what_is_known_is_read():
    """A high loss and a low one that do not fall are worth the same: little."""
    mixer = observed(make_mixer("progress", sources=NAMES), 400, [0.5, 0.3, 0.0, 0.0], wobble=0.05)
    weights = mixer.weights()
    assert weights[:2].min() > 0.35
    assert weights[2:].max() < 0.12
    odm = observed(make_mixer("odm", sources=NAMES), 400, [0.5, 0.3, 0.0, 0.0], wobble=0.05)
    assert odm.weights()[2] > 0.4


def test_nothing_learned_anywhere_is_the_prior():
    """Flat or rising losses give no reason to move."""
    for fall in ([0.0] * 4, [-0.3] * 4):
        mixer = observed(
            make_mixer("progress", sources=NAMES, prior=[0.4, 0.3, 0.2, 0.1]), 50, fall
        )
        np.testing.assert_allclose(mixer.weights(), [0.4, 0.3, 0.2, 0.1])


def test_a_source_that_was_never_drawn_counts_as_the_mean():
    """It has the slope of all together, so it keeps about its prior share."""
    mixer = observed(
        make_mixer("progress", sources=NAMES, least=0.0), 100, [0.4] * 4, counts=(8, 8, 8, 0)
    )
    np.testing.assert_allclose(mixer.weights(), 0.25, atol=1e-6)


@pytest.mark.parametrize("recent", [0.0, 10.0])
def test_a_prior_of_0_stays_0(recent):
    """Whether or not such a source is read; its logarithm does no harm."""
    mixer = make_mixer("progress", sources=NAMES, prior=[0.5, 0.3, 0.2, 0.0], recent=recent)
    with np.errstate(all="raise", under="ignore"):
        weights = observed(
            mixer, 50, [0.5, 0.3, 0.0, 0.2], counts=(8, 8, 8, 0), wobble=0.01
        ).weights()
    assert weights[3] == 0 and weights[:3].min() > 0


@pytest.mark.parametrize("option", [{"memory": -1}, {"caution": -1}, {"least": 1.5}, {"enough": 0}])
def test_refuses(option):
    """Settings that have no meaning."""
    with pytest.raises(ConfigError, match="progress: expected"):
        make_mixer("progress", sources=NAMES, **option)
