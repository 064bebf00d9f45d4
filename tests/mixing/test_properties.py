"""Weights stay on the simplex for any input; unit tests of the parts."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.core.errors import ConfigError, TrainingError
from castalia.mixing import Stats, make_mixer
from castalia.mixing.simplex import cap, fill, normalise, towards

LOSSES = st.floats(allow_nan=True, allow_infinity=True, width=64) | st.floats(0, 12)
STEPS = st.lists(
    st.tuples(
        st.lists(LOSSES, min_size=5, max_size=5),
        st.lists(st.integers(0, 3), min_size=5, max_size=5),
    )
)
SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda x: sum(x) > 1e-3)


def on_the_simplex(weights):
    return np.isfinite(weights).all() and weights.min() >= 0 and abs(weights.sum() - 1) < 1e-9


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_any_losses_leave_a_distribution(build, steps):
    mixer = build()
    for step, (losses, tokens) in enumerate(steps, 1):
        with np.errstate(all="ignore"):
            sums = np.array(losses) * np.array(tokens)
        mixer.observe(Stats(step, sums, tokens, val_loss=losses))
        assert on_the_simplex(mixer.weights()), mixer.weights()
    json.dumps(mixer.state_dict(), allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(shares=SHARES, most=st.floats(0.01, 1))
def test_cap(shares, most):
    weights = normalise(np.array(shares))
    capped = cap(weights, most)
    assert on_the_simplex(capped)
    assert capped.max() <= max(most, 1 / len(weights)) + 1e-9
    small = weights <= capped + 1e-12
    assert (capped[small] + 1e-9 >= weights[small]).all()


@settings(max_examples=50, deadline=None)
@given(limits=st.lists(st.floats(0, 10), min_size=1, max_size=9), share=st.floats(0, 1))
def test_fill(limits, share):
    limits = np.array(limits)
    filled = fill(limits, share * limits.sum())
    assert filled.sum() == pytest.approx(share * limits.sum())
    assert (filled <= limits).all()


def test_cap_keeps_the_proportions_of_the_others():
    np.testing.assert_allclose(cap(np.array([0.8, 0.15, 0.05]), 0.5), [0.5, 0.375, 0.125])
    np.testing.assert_allclose(
        cap(np.array([0.8, 0.2, 0.0]), 0.4), [0.4, 0.4, 0.2], err_msg="0 may rise where it must"
    )
    np.testing.assert_allclose(cap(np.array([0.7, 0.3]), np.array([0.2, 0.2])), [0.5, 0.5])


BAD = {
    "nan": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "huge": 1e300,
    "above 709": 720.0,
}


@pytest.mark.parametrize("loss", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["odm", "odm-repo", "odm-paper", "exp3"])
def test_a_loss_that_is_none_is_counted_and_changes_nothing(name, loss):
    """The source with the bad loss is treated as not drawn."""
    clean, dirty = (make_mixer(name, sources=["a", "b", "c"]) for _ in range(2))
    for step in range(1, 60):
        bad = step == 40
        clean.observe(Stats(step, [2.0, 0.0 if bad else 3.0, 4.0], [1, 0 if bad else 1, 1]))
        dirty.observe(Stats(step, [2.0, loss if bad else 3.0, 4.0], [1, 1, 1]))
        np.testing.assert_array_equal(clean.weights(), dirty.weights())
    assert dirty.rejected_losses().tolist() == [0, 1, 0]
    assert clean.rejected_losses().tolist() == [0, 0, 0]


def test_after_warmup_no_share_moves_by_more_than_two():
    """Four draws a step over eight sources, losses of any height, spikes among them."""
    random = np.random.default_rng(0)
    mixer = make_mixer("odm", sources=[f"s{i}" for i in range(8)], warmup_steps=30, max_share=1.0)
    means = random.uniform(1, 5, 8)
    for step in range(1, 300):
        tokens = np.zeros(8)
        tokens[random.choice(8, 4)] = 1
        before = mixer.weights()
        spike = np.where(random.random(8) < 0.02, 20.0, 0.0)
        mixer.observe(Stats(step, (means + random.normal(0, 0.2, 8) + spike) * tokens, tokens))
        if step > 31:
            ratio = mixer.weights() / before
            assert ratio.min() >= 0.5 and ratio.max() <= 2


@pytest.mark.parametrize("prior", ["uniform", "skewed"])
def test_the_prior_gives_way_in_steps_of_two(prior):
    """22 sources of 0.8 to 4 nats after a long warm-up: first step limited, goal reached."""
    names, losses = [f"s{i}" for i in range(22)], np.linspace(0.8, 4.0, 22)
    start = np.linspace(1, 0.001, 22) if prior == "skewed" else np.ones(22)
    mixer, free = (
        make_mixer("odm", names, prior=start / start.sum(), warmup_steps=steps, max_share=1.0)
        for steps in (1000, 0)
    )
    largest = []
    for step in range(1, 1040):
        before = mixer.weights()
        for one in (mixer, free):
            one.observe(Stats(step, losses, np.ones(22)))
        largest.append(max((mixer.weights() / before).max(), (before / mixer.weights()).max()))
    assert largest[998] == 1 and 1.9 < largest[999] <= 2 + 1e-9 and max(largest) <= 2 + 1e-9
    assert mixer.weights().tolist() == free.weights().tolist()


def test_towards():
    """From a half each to 0.9 and 0.1: 0.1 is more than a half away, so 5/8 of the way is gone."""
    half, goal = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    np.testing.assert_allclose(towards(half, goal, 2.0), [0.75, 0.25])
    assert towards(half, np.array([0.6, 0.4]), 2.0).tolist() == [0.6, 0.4]
    np.testing.assert_allclose(towards(np.array([1.0, 0.0]), np.array([0.4, 0.6]), 2.0), [0.5, 0.5])


def test_noise_does_not_take_the_batch():
    """A source of 10 nats among sources of 2: nearly all under odm-repo, at most half under odm."""
    losses = np.array([2.0, 2.0, 2.0, 10.0])
    last = {}
    for name in ("odm", "odm-repo"):
        mixer = make_mixer(name, sources=list("abcd"))
        for step in range(1, 5_000):
            mixer.observe(Stats(step, losses, np.ones(4)))
        last[name] = mixer.weights()[3]
    assert last["odm-repo"] > 0.95
    assert last["odm"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name", ["odm", "odm-repo", "odm-paper", "exp3", "naive-validation", "ado", "static"]
)
def test_one_source(name):
    mixer = make_mixer(name, sources=["all"], warmup_steps=1)
    for step in range(1, 5):
        mixer.observe(Stats(step, [3.0], [1], val_loss=[3.0]))
        assert mixer.weights().tolist() == [1.0]


def test_an_empty_source(build):
    with pytest.raises(
        ConfigError, match=r"source 'mail' is empty; remove it, or pass allow_empty=True"
    ):
        build(sizes=[400, 90, 1000, 0, 250])
    mixer = build(sizes=[400, 90, 1000, 0, 250], allow_empty=True)
    for step in range(1, 30):
        mixer.observe(Stats(step, [2, 3, 4, 0, 2], [1, 1, 1, 0, 1], val_loss=[2, 3, 4, 0, 2]))
        assert mixer.weights()[3] == 0.0
        assert on_the_simplex(mixer.weights())


def test_stats_of_the_wrong_length_or_step():
    mixer = make_mixer("odm", sources=["a", "b"])
    with pytest.raises(
        TrainingError, match=r"step 3: Stats.tokens has shape \(3,\); expected \(2,\)"
    ):
        mixer.observe(Stats(3, [1, 2], [1, 2, 3]))
    mixer.observe(Stats(4, [1, 2], [1, 2]))
    with pytest.raises(TrainingError, match="already observed step 4 and got the stats of step 4"):
        mixer.observe(Stats(4, [1, 2], [1, 2]))


def test_a_skipped_step_changes_no_estimate():
    mixer = make_mixer("odm", sources=["a", "b"])
    mixer.observe(Stats(1, [1, 2], [1, 1]))
    before = mixer.weights()
    mixer.observe(Stats(2, [0, 0], [0, 0]))
    assert mixer.weights() is before


def test_weights_cannot_be_written(build):
    with pytest.raises(ValueError, match="read-only"):
        build().weights()[0] = 1


WRONG = {
    "unknown mixer 'odn'; choose one of ado, dbl.*did you mean 'odm'": {"name": "odn"},
    "unknown option 'smoothing' of mixer 'static'; its own: none": {
        "name": "static", "smoothing": 0.5,
    },
    "unknown option 'smothing' of mixer 'odm'.*did you mean 'smoothing'": {"smothing": 0.5},
    "prior: shares must sum to 1, got 4; divided by their sum: .0.75, 0.25.": {"prior": [3, 1]},
    "prior: source 'b' has -1; expected >= 0": {"prior": [2, -1]},
    "prior: source 'b' has nan; expected a finite number": {"prior": [1, math.nan]},
    "prior: expected 2 numbers, one per source, got shape .3,.": {"prior": [1, 0, 0]},
    "prior: unknown source 'bb'; choose one of a, b; did you mean 'b'": {
        "prior": {"a": 0.5, "bb": 0.5},
    },
    "prior: source 'b' is missing": {"prior": {"a": 1.0}},
    "sources: 'a' named more than once": {"sources": ["a", "a"]},
    "sources: expected a list of at least one name": {"sources": []},
    "smoothing: expected in .0, 1., got 1.0": {"smoothing": 1.0},
    "eps: expected between 0 and 1/K = 0.5": {"eps": 0.6},
    "reward: expected ppl or loss, got 'x'": {"reward": "x"},
    "max_share: expected between 1/K = 0.5 for 2 sources and 1, got 0.3": {"max_share": 0.3},
    "floor: expected between 0 and 1": {"floor": 1.5},
    "mixer 'natural' needs the sizes": {"name": "natural"},
    "all sources are empty": {"sizes": [0, 0], "allow_empty": True},
    "epoch_cap needs sizes": {"epoch_cap": 2.0},
    "mixer 'dbl' needs target=": {"name": "dbl"},
    "mixer 'unimax' needs budget=": {"name": "unimax", "sizes": [1, 2]},
    "unimax: 2 epochs of all sources are 6 tokens, but the run needs 12; set max_epochs to 4": {
        "name": "unimax", "sizes": [1, 2], "budget": 12, "max_epochs": 2,
    },
    "temperature: expected > 0": {"name": "temperature", "sizes": [1, 2], "temperature": 0},
    "mixer 'replay' needs record=": {"name": "replay"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings(message):
    with pytest.raises(ConfigError, match=message):
        make_mixer(**({"name": "odm", "sources": ["a", "b"]} | WRONG[message]))


def test_doremi_without_a_reference():
    mixer = make_mixer("doremi", sources=["a", "b"])
    with pytest.raises(ConfigError, match="mixer 'doremi' needs reference= losses"):
        mixer.observe(Stats(1, [1, 2], [1, 1]))


def test_many_sources_are_told_when_exploration_leaves_nothing_to_learn():
    names = [f"s{i}" for i in range(1000)]
    (note,) = make_mixer("odm", sources=names, warmup_steps=10).notes(10_000)
    assert (
        "with 1000 sources, exploration mixes 100% of the data uniformly at a fifth of the run"
        " and 83% at its end" in note
    )
    assert make_mixer("odm", sources=names, eps=1e-5).notes(10_000) == []
    assert make_mixer("odm", sources=names[:20]).notes(10_000) == []
