"""A resumed run equals an uninterrupted one, for every mixer; sources added and removed."""

import json

import numpy as np
import pytest

from castalia.core.errors import CheckpointError, ConfigError
from castalia.mixing import Average, Freeze, Planner, Schedule, Smooth, Stats, make_mixer

ROWS = [40, 9, 100, 37, 25]


def run(planner, first, last, stats_of, *, ahead=0):
    """Plan and observe; return each step's ids and weights. Plans ahead as the lag allows."""
    seen = []
    plans = [planner.plan(first + i) for i in range(ahead)]
    for step in range(first, last + 1):
        plans.append(planner.plan(step + ahead))
        plan = plans.pop(0)
        rows = plan.rows()
        seen.append((step, plan.weights.tolist(), rows.source.tolist(), rows.index.tolist()))
        planner.observe(stats_of(step, plan.counts))
    return seen


@pytest.mark.parametrize("cut", [3, 31])
def test_resumed_equals_uninterrupted(build, stats_of, cut):
    """60 steps, or `cut` steps, a state through JSON with steps planned ahead, and the rest."""

    def planner():
        return Planner(
            build(),
            sizes=ROWS,
            rows=12,
            seed=7,
            lag=2,
            exhaustion={"books": "cap:2", "mail": "drop"},
        )

    whole = run(planner(), 1, 60, stats_of)
    before = planner()
    assert run(before, 1, cut, stats_of, ahead=2) == whole[:cut]
    state = json.loads(json.dumps(before.state_dict(), allow_nan=False))
    after = planner()
    after.load_state_dict(state)
    assert run(after, cut + 1, 60, stats_of, ahead=1) == whole[cut:]
    assert json.dumps(after.state_dict()["mixer"]) != json.dumps(state["mixer"])


def combined():
    """Everything that can be put around a mixer, at once."""
    names = ["a", "b", "c", "d", "e"]
    odm, ado = (
        make_mixer("odm", sources=names, update_every=3),
        make_mixer("ado", sources=names, refit_every=9),
    )
    return Freeze(Average(Smooth(Schedule([(1, odm), (25, ado)]), past=0.5)), after=50)


def test_combinators_resume_too(stats_of):
    whole = run(Planner(combined(), sizes=ROWS, rows=12, seed=7), 1, 60, stats_of)
    before, after = (Planner(combined(), sizes=ROWS, rows=12, seed=7) for _ in range(2))
    run(before, 1, 28, stats_of)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert run(after, 29, 60, stats_of) == whole[28:]
    assert whole[51][1] == whole[59][1] != whole[40][1], "frozen after step 50"


def test_a_state_of_an_earlier_step_plans_the_same_again():
    """A static run that was planned ten steps ahead goes back to step 5."""
    names = ["a", "b"]
    first, second = (
        Planner(make_mixer("uniform", sources=names), sizes=[30, 40], rows=8, seed=1)
        for _ in range(2)
    )
    plans = [first.plan(step).rows().index.tolist() for step in range(1, 16)]
    second.load_state_dict(first.state_dict(step=5))
    assert [second.plan(step).rows().index.tolist() for step in range(6, 16)] == plans[5:]


def learned(names, **settings):
    mixer = make_mixer("odm", sources=names, **settings)
    return Planner(
        mixer, sizes={name: 10 * (i + 1) for i, name in enumerate(sorted(names))}, rows=8, seed=1
    )


def fed(names, steps=20):
    planner = learned(names)
    for step in range(1, steps + 1):
        plan = planner.plan(step)
        planner.observe(Stats(step, (1.0 + np.arange(len(names))) * plan.counts, plan.counts))
    return planner


def test_sources_in_another_order_are_the_same_sources():
    before = fed(["a", "b", "c"])
    after = learned(["c", "a", "b"])
    after.load_state_dict(before.state_dict())
    assert after.mixer.weights().tolist() == before.mixer.weights()[[2, 0, 1]].tolist()
    assert after.cursors.tolist() == before.cursors[[2, 0, 1]].tolist()


def test_an_added_source():
    before = fed(["a", "b"])
    with pytest.raises(
        CheckpointError,
        match=r"this run has source 'c', which the state lacks.*on_new=\"prior\"",
    ):
        learned(["a", "b", "c"]).load_state_dict(before.state_dict())
    prior, mean = learned(["a", "b", "c"]), learned(["a", "b", "c"])
    prior.load_state_dict(before.state_dict(), on_new="prior")
    old = before.mixer.weights()
    np.testing.assert_allclose(prior.mixer.weights(), np.array([*old, 1 / 3]) / (4 / 3))
    mean.load_state_dict(before.state_dict(), on_new="mean")
    np.testing.assert_allclose(mean.mixer.weights(), np.array([*old, 0.5]) / 1.5)
    for planner in (prior, mean):
        plan = planner.plan(21)
        assert plan.starts.tolist() == [*before.cursors.tolist(), 0]
        planner.observe(Stats(21, np.array([1.0, 2.0, 3.0]) * plan.counts, plan.counts))
        assert planner.mixer.weights().sum() == pytest.approx(1)


def test_a_removed_or_unknown_source():
    before = fed(["code", "web"])
    message = r"'web', which this run lacks; did you mean 'webs'\? \(this run has code, webs\)"
    with pytest.raises(CheckpointError, match=message):
        learned(["code", "webs"]).mixer.load_state_dict(before.mixer.state_dict())
    after = learned(["code"])
    with pytest.raises(
        CheckpointError, match=r"source 'web', which this run lacks.*on_removed=\"drop\" drops it"
    ):
        after.load_state_dict(before.state_dict())
    after.load_state_dict(before.state_dict(), on_removed="drop")
    assert after.mixer.weights().tolist() == [1.0]
    with pytest.raises(ConfigError, match="on_new: expected error or prior or mean, got 'guess'"):
        after.load_state_dict(before.state_dict(), on_new="guess")


def test_states_that_do_not_fit():
    state = fed(["a", "b"]).state_dict()
    other = make_mixer("uniform", sources=["a", "b"])
    with pytest.raises(
        CheckpointError, match="the state belongs to mixer 'clip', but this run has 'uniform'"
    ):
        other.load_state_dict(state["mixer"])
    with pytest.raises(CheckpointError, match="the planner's state has seed 2, but this run has 1"):
        learned(["a", "b"]).load_state_dict(state | {"seed": 2})
    with pytest.raises(
        CheckpointError, match="expected a planner's state of format 1, got format None"
    ):
        learned(["a", "b"]).load_state_dict({})
    larger = json.loads(json.dumps(state))
    larger["sources"]["b"]["size"] = 21
    with pytest.raises(
        CheckpointError, match="source 'b' has 20 rows, but the state was saved with 21"
    ):
        learned(["a", "b"]).load_state_dict(larger)
    learned(["a", "b"]).load_state_dict(larger, allow_changed=True)
    with pytest.raises(CheckpointError, match="the state of mixer 'clip' is damaged: KeyError"):
        damaged = {"kind": "clip", "step": 3, "inner": state["mixer"]["inner"]}
        learned(["a", "b"]).load_state_dict(state | {"mixer": damaged})
