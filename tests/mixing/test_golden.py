"""Each mixer against numbers worked out by hand."""

import math

import numpy as np
import pytest

from castalia.mixing import Stats, make_mixer
from castalia.mixing.ado import fit
from castalia.mixing.bandits import exploration

TWO = ["a", "b"]
EPS_100 = 0.0588705011
"""sqrt(ln 2 / 200): eps of two sources at step 100."""
KEPT = 1 - 2 * EPS_100


def at_100(losses, mixer, *, val=None, ones=2):
    """The weights after one observation at step 100, where exploration is small."""
    tokens = np.ones(ones)
    mixer.observe(Stats(100, np.array(losses) * tokens, tokens, val_loss=val))
    return mixer.weights()


def test_exploration():
    assert exploration(1, 2) == 0.5
    assert exploration(100, 2) == pytest.approx(EPS_100, abs=1e-10)
    assert exploration(67, 22) == 1 / 22, "constant until K ln K = 68.0"
    assert exploration(69, 22) < 1 / 22
    assert 1000 * exploration(10_000, 1000) == pytest.approx(0.831, abs=1e-3)
    assert exploration(5, 1) == 0


def test_static_natural_uniform():
    assert make_mixer("static", sources=TWO, prior=[0.2, 0.8]).weights().tolist() == [0.2, 0.8]
    assert make_mixer("static", sources=TWO, prior={"b": 0.25, "a": 0.75}).weights().tolist() == [
        0.75,
        0.25,
    ]
    assert make_mixer("natural", sources=TWO, sizes=[100, 300]).weights().tolist() == [0.25, 0.75]
    assert make_mixer("uniform", sources=TWO, prior=[0.2, 0.8]).weights().tolist() == [0.5, 0.5]


def test_temperature():
    weights = make_mixer("temperature", sources=TWO, sizes=[100, 400], temperature=2).weights()
    np.testing.assert_allclose(weights, [1 / 3, 2 / 3], rtol=1e-12)
    np.testing.assert_allclose(
        make_mixer("temperature", sources=TWO, sizes=[100, 400], temperature=1e9).weights(),
        [0.5, 0.5],
        atol=1e-8,
    )


def test_unimax():
    """Budget 30: 10 each, but 4 epochs of the smallest are 4; the other two take 13 each."""
    names = ["large", "small", "middle"]
    weights = make_mixer(
        "unimax", sources=names, sizes=[100, 1, 10], budget=30.0, max_epochs=4
    ).weights()
    np.testing.assert_allclose(weights, [13 / 30, 4 / 30, 13 / 30], rtol=1e-12)


def test_odm_repo():
    """Perplexities 2 and 4 give means 1 and 2 (weight 0.5, from 0), hence q of 1/3 and 2/3."""
    mixer = make_mixer("odm-repo", sources=TWO, smoothing=0.5)
    expected = [KEPT / 3 + EPS_100, KEPT * 2 / 3 + EPS_100]
    np.testing.assert_allclose(at_100([math.log(2), math.log(4)], mixer), expected, rtol=1e-9)
    np.testing.assert_allclose(mixer.weights(), [0.3529568, 0.6470432], atol=1e-7)


def test_odm_repo_leaves_undrawn_sources_at_the_floor():
    mixer = make_mixer("odm-repo", sources=TWO)
    mixer.observe(Stats(100, [3.0, 0.0], [1, 0]))
    np.testing.assert_allclose(mixer.weights(), [1 - EPS_100, EPS_100], rtol=1e-9)


def test_odm_paper():
    """R = 0.5 * loss / 0.5 = 1 and 2; eps_99 = sqrt(ln 2 / 198) = 0.0591671, sigmoid 0.5147875."""
    weights = at_100([1.0, 2.0], make_mixer("odm-paper", sources=TWO, smoothing=0.5))
    np.testing.assert_allclose(weights, [0.4869535, 0.5130465], atol=2e-7)


def test_exp3():
    """R = 0.1 * loss / 0.5 = 0.2 and 0.4; the first eps is 1/2; sigmoid(0.1) = 0.5249792."""
    weights = at_100([1.0, 2.0], make_mixer("exp3", sources=TWO))
    np.testing.assert_allclose(weights, [0.4779619, 0.5220381], atol=2e-7)


def test_naive_validation():
    """C = 0 and 1; sigmoid(0.5) = 0.6224593."""
    weights = at_100([0.0, 0.0], make_mixer("naive-validation", sources=TWO), val=[2.0, 5.0])
    np.testing.assert_allclose(weights, [0.3919592, 0.6080408], atol=2e-7)


def test_dynamic_batch_loading():
    """Distances 0 and 1: e / (1 + e) = 0.7310586, a ten-thousandth of it spread evenly."""
    mixer = make_mixer("dbl", sources=TWO, target=[2.0, 2.0])
    np.testing.assert_allclose(
        at_100([0.0, 0.0], mixer, val=[2.0, 3.0]), [0.2689645, 0.7310355], atol=1e-7
    )
    mixer.observe(Stats(101, [0, 0], [0, 0]))
    np.testing.assert_allclose(mixer.weights()[1], 0.9999 * 0.73105858 + 5e-5, atol=1e-8)


def test_dynamic_batch_loading_clamps_on_demand():
    """Distances -1 and 1: two nats apart without the clamp, one with it."""
    for clamp, expected in ((False, 1 / (1 + math.exp(-2))), (True, 1 / (1 + math.exp(-1)))):
        mixer = make_mixer("dbl", sources=TWO, target=[2.0, 2.0], clamp=clamp, least=0.0)
        np.testing.assert_allclose(at_100([0, 0], mixer, val=[1.0, 3.0])[1], expected, rtol=1e-12)


def test_doremi():
    """Excess losses 0 (clamped from -1) and 1; an undrawn source keeps its score."""
    mixer = make_mixer("doremi", sources=TWO, reference=[3.0, 2.0])
    first = 0.999 * 0.73105858 + 5e-4
    np.testing.assert_allclose(at_100([2.0, 3.0], mixer)[1], first, atol=1e-8)
    mixer.observe(Stats(101, [2.0, 0.0], [1, 0]))
    ratio = first / (1 - first) * math.e
    np.testing.assert_allclose(mixer.weights()[1], 0.999 * ratio / (1 + ratio) + 5e-4, rtol=1e-8)


@pytest.mark.parametrize("extra", [{"ref_loss_sum": [6.0, 4.0]}, {"excess_sum": [0.0, 2.0]}])
def test_doremi_takes_reference_sums(extra):
    mixer = make_mixer("doremi", sources=TWO)
    mixer.observe(Stats(1, [4.0, 6.0], [2, 2], **extra))
    np.testing.assert_allclose(mixer.weights()[1], 0.999 * 0.73105858 + 5e-4, atol=1e-8)


def test_odm_has_no_cold_start():
    """The first perplexities count in full: shares 1/3 and 2/3 at once."""
    mixer = make_mixer("odm", sources=TWO, smoothing=0.5)
    np.testing.assert_allclose(
        at_100([math.log(2), math.log(4)], mixer), [0.3529568, 0.6470432], atol=1e-7
    )


def test_odm_running_mean():
    """Weight 0.5, second drawing: 2 + 2/3 (2.3 - 2) = 2.2 and 4 + 2/3 (3.4 - 4) = 3.6."""
    mixer = make_mixer("odm", sources=TWO, smoothing=0.5, eps=0.0)
    mixer.observe(Stats(1, [math.log(2), math.log(4)], [1, 1]))
    mixer.observe(Stats(2, [math.log(2.3), math.log(3.4)], [1, 1]))
    np.testing.assert_allclose(mixer.weights(), [2.2 / 5.8, 3.6 / 5.8], rtol=1e-12)


def test_odm_counts_drawings_and_not_steps():
    """The second source is drawn at steps 5 and 6 alone: 4, then 4 + 2/3 (3.4 - 4) = 3.6."""
    mixer = make_mixer("odm", sources=TWO, smoothing=0.5, eps=0.0)
    for step in range(1, 7):
        late = step >= 5
        mixer.observe(
            Stats(step, [math.log(2), math.log(4 if step == 5 else 3.4) * late], [1, late])
        )
    np.testing.assert_allclose(mixer.weights(), [2 / 5.6, 3.6 / 5.6], rtol=1e-12)


def test_odm_guard():
    """A leap of perplexity from 4 to 100 moves the mean to 4 sqrt 2 only."""
    mixer = make_mixer("odm", sources=TWO, smoothing=0.5, eps=0.0)
    mixer.observe(Stats(1, [math.log(2), math.log(4)], [1, 1]))
    mixer.observe(Stats(2, [math.log(2), math.log(100)], [1, 1]))
    np.testing.assert_allclose(mixer.weights(), [2 / 7.6568542, 5.6568542 / 7.6568542], rtol=1e-7)


def test_odm_keeps_the_prior_of_what_it_has_not_seen():
    """Perplexities 2 and 6 share 0.8 in the ratio 1 : 3; the third holds its 0.2."""
    mixer = make_mixer("odm", sources=["a", "b", "c"], prior=[0.5, 0.3, 0.2], eps=0.0)
    mixer.observe(Stats(1, [math.log(2), math.log(6), 0], [1, 1, 0]))
    np.testing.assert_allclose(mixer.weights(), [0.2, 0.6, 0.2], rtol=1e-12)


def test_odm_excess_over_a_reference():
    """Perplexity over the reference's: 2 and 1."""
    mixer = make_mixer("odm", sources=TWO, eps=0.0, reference={"a": 1.0, "b": 4.0})
    mixer.observe(Stats(1, [1 + math.log(2), 4.0], [1, 1]))
    np.testing.assert_allclose(mixer.weights(), [2 / 3, 1 / 3], rtol=1e-12)


@pytest.mark.parametrize("name", ["odm", "odm-repo"])
def test_odm_fixed_point(name):
    """Constant losses: p -> (1 - K eps) PPL / sum PPL + eps."""
    ppl = np.array([2.0, 3.0, 5.0])
    mixer = make_mixer(name, sources=["a", "b", "c"])
    for step in range(1, 500):
        mixer.observe(Stats(step, np.log(ppl), np.ones(3)))
    eps = math.sqrt(math.log(3) / (3 * 499))
    np.testing.assert_allclose(mixer.weights(), (1 - 3 * eps) * ppl / 10 + eps, rtol=1e-9)


def test_ado_recovers_scaling_laws():
    tokens = np.full((2, 60), 100.0)
    n = np.cumsum(tokens.sum(0)) - 100
    curves = np.stack([2 + 30 * n**-0.5, 0.0 + 5 * n**-0.2])
    floor, beta, alpha = fit(curves * tokens, tokens)
    np.testing.assert_allclose(
        curves, floor[:, None] + beta[:, None] * n ** -alpha[:, None], rtol=0.03
    )
    np.testing.assert_allclose(alpha, [0.5, 0.2], atol=0.02)


def test_ado_follows_the_speed_of_learning():
    """Known laws: rho = prior sqrt(h (1 - h)) a b n ** (-a - 1), with a tenth of the weight."""
    mixer = make_mixer("ado", sources=TWO, prior=[0.5, 0.5], smoothing=0.0)
    mixer.fitted, mixer.tokens = True, 900.0
    mixer.alpha, mixer.beta, mixer.last_fit = np.array([0.5, 0.25]), np.array([40.0, 8.0]), 1
    mixer.observe(Stats(2, [60.0, 140.0], [30, 70]))
    speed = np.array([0.5 * 40 * 1000**-1.5, 0.25 * 8 * 1000**-1.25])
    np.testing.assert_allclose(mixer.weights(), 0.9 * 0.5 + 0.1 * speed / speed.sum(), rtol=1e-12)
    np.testing.assert_allclose(
        mixer.mean_share, (np.array([0.5, 0.5]) + mixer.weights()) / 2, rtol=1e-12
    )
