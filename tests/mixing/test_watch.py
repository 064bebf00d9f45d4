"""Warnings about a mixture: noise that is read ever more, and a mixture down to one source."""

import numpy as np
import pytest

from castalia.mixing import Planner, Stats, Watch, make_mixer

NAMES = ("easy", "hard", "noise")


def heard(name, floors, steps=400, **options):
    """(step, sentence) of all that is said when losses fall to their floors from 6 nats."""
    mixer = make_mixer(name, NAMES, warmup_steps=20, **options)
    planner, watch, said = (
        Planner(mixer, sizes=[10_000] * 3, rows=24, seed=1),
        Watch(NAMES, mixer.prior),
        [],
    )
    for step in range(1, steps + 1):
        plan = planner.plan(step)
        means = np.array(floors) + (6 - np.array(floors)) * step**-0.4
        stats = Stats(step, means * plan.counts, plan.counts)
        planner.observe(stats)
        said += [(step, text) for text in watch.observe(plan.weights, stats)]
    return said


def test_noise_that_is_read_more_is_told_once():
    """A loss of 6 nats that stands, under a rule that follows the loss."""
    ((step, text),) = heard("odm-repo", [1.0, 2.0, 6.0], eps=0.02)
    assert 100 < step < 110
    assert (
        text.startswith("the share of source 'noise' rose from ")
        and "(6.00 nats) has not fallen by 1% for 1" in text
    )


@pytest.mark.parametrize("name", ["uniform", "progress"])
def test_a_mixer_that_leaves_noise_alone_is_not_told(name):
    assert heard(name, [1.0, 2.0, 6.0]) == []


def test_a_source_that_is_read_more_and_learns_is_not_told():
    assert heard("odm", [1.0, 3.0, 2.5]) == []


def test_a_source_that_is_nearly_alone():
    """Of eight effective sources 1.1 are left."""
    names = tuple("abcdefgh")
    watch = Watch(names, np.full(8, 1 / 8))
    weights = np.array([0.98, *[0.02 / 7] * 7])
    (text,) = watch.observe(weights, Stats(1, np.ones(8), np.ones(8)))
    assert text.startswith("the mixture is down to 1.1 effective sources of 8, led by 'a' (98%)")
    assert watch.observe(weights, Stats(2, np.ones(8), np.ones(8))) == ()


def test_losses_that_are_none_and_sources_that_are_not_read():
    watch = Watch(NAMES, np.array([0.2, 0.4, 0.4]))
    for step in range(1, 300):
        stats = Stats(step, [np.nan, np.inf, 0.0], [1, 1, 0])
        assert watch.observe(np.array([0.9, 0.05, 0.05]), stats) == ()
