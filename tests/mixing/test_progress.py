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


def inner(mixer):
    """The mixer inside everything around it."""
    return inner(mixer.inner[0]) if mixer.inner else mixer


def test_slopes_of_a_straight_line():
    """Losses that are lines in ln t at even shares: the slopes come out, drawn a little towards their mean."""
    mixer = observed(make_mixer("progress", sources=NAMES, caution=1e-9, least=1.0), 200, [0.6, 0.2, 0.0, 0.0])
    np.testing.assert_allclose(mixer.slopes(), [0.6, 0.2, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(mixer.weights(), 0.25)


def test_shares_by_hand():
    """Two steps, by hand: x = 0 and ln 2, the second with weight 1 and the first with 1 / 2 ** memory = 1/4."""
    mixer = make_mixer("progress", sources=["a", "b"], memory=2.0, caution=0.5, least=0.2, recent=0.0)
    tokens = np.array([10.0, 10.0])
    mixer.observe(Stats(1, np.array([5.0, 4.0]) * tokens, tokens))
    mixer.observe(Stats(2, np.array([4.0, 3.7]) * tokens, tokens))
    spread = (1 * 0.25 / 1.25) * np.log(2) ** 2  # sum of weights times variance, of either source
    falls = np.array([1.0, 0.3]) / np.log(2) * spread
    pooled, trust = falls.sum() / (2 * spread), 0.5 * 2 * spread / 2.5
    slopes = (falls + trust * pooled) / (spread + trust)
    np.testing.assert_allclose(mixer.slopes(), slopes)
    np.testing.assert_allclose(mixer.weights(), 0.8 * slopes / slopes.sum() + 0.1)


def test_neither_noise_nor_what_is_known_is_read():
    """A high loss and a low one that do not fall are worth the same: little."""
    mixer = observed(make_mixer("progress", sources=NAMES, least=0.1), 400, [0.5, 0.5, 0.0, 0.0], wobble=0.1)
    weights = mixer.weights()
    assert weights[:2].min() > 0.35
    assert weights[2:].max() < 0.13
    odm = observed(make_mixer("odm", sources=NAMES), 400, [0.5, 0.5, 0.0, 0.0], wobble=0.1)
    assert odm.weights()[2] > 0.4


def test_nothing_learned_anywhere_is_the_prior():
    """Flat or rising losses give no reason to move."""
    for fall in ([0.0] * 4, [-0.3] * 4):
        mixer = observed(make_mixer("progress", sources=NAMES, prior=[0.4, 0.3, 0.2, 0.1]), 50, fall)
        np.testing.assert_allclose(mixer.weights(), [0.4, 0.3, 0.2, 0.1])


def test_a_source_that_was_never_drawn_counts_as_the_mean():
    """It has the slope of all together, so it keeps about its prior share."""
    mixer = observed(make_mixer("progress", sources=NAMES, least=0.0), 100, [0.4] * 4, counts=(8, 8, 8, 0))
    np.testing.assert_allclose(mixer.weights(), 0.25, atol=1e-6)


@pytest.mark.parametrize("option", [{"memory": -1}, {"caution": 0}, {"least": 1.5}, {"power": -1}])
def test_refuses(option):
    """Settings that have no meaning."""
    with pytest.raises(ConfigError, match="progress: expected"):
        make_mixer("progress", sources=NAMES, **option)
