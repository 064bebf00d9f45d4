"""Arguments of other types, of wrong types and out of range; states that are damaged."""

import json
import math

import numpy as np
import pytest

from castalia.core.errors import CheckpointError, ConfigError, TrainingError
from castalia.mixing import Planner, Stats, make_mixer

NAMES = ["a", "b", "c"]


def planner_of(**settings):
    return Planner(
        make_mixer("odm", NAMES),
        **({"sizes": [50, 60, 70], "rows": 8, "seed": 3, "lag": 1} | settings),
    )


@pytest.mark.parametrize(
    "names", [tuple(NAMES), np.array(NAMES), dict.fromkeys(NAMES).keys(), (n for n in NAMES)]
)
def test_sources_in_any_form(names):
    mixer = make_mixer("odm", names, prior=np.array([0.5, 0.25, 0.25]), reference=None)
    mixer.observe(Stats(1, [2.0, 3, 4], (1, 1, 1)))
    assert json.loads(json.dumps(mixer.state_dict()))["sources"].keys() == set(NAMES)


def test_numbers_of_numpy_are_numbers():
    """They go into states, which are JSON, and into keys, which are of more than 64 bits."""
    plain, numpy = planner_of(), planner_of(rows=np.int32(8), seed=np.int64(3), lag=np.uint8(1))
    for step in (1, 2):
        theirs = numpy.plan(np.int64(step)).rows(np.int64(0)).index.tolist()
        assert theirs == plain.plan(step).rows().index.tolist()
        for planner in (plain, numpy):
            planner.observe(Stats(np.int64(step), np.float32([1, 2, 3]), np.int16([1, 1, 1])))
    assert json.dumps(numpy.state_dict()) == json.dumps(plain.state_dict())


@pytest.mark.parametrize("kind", ["odm", "odm-repo", "ado", "progress", "doremi", "exp3"])
@pytest.mark.parametrize("count", [math.inf, -math.inf, math.nan])
def test_a_count_that_is_none_is_refused_like_a_loss(kind, count):
    """The source counts as not drawn; nothing that is kept is infinite."""
    options = {"reference": [2.0, 2, 2]} if kind == "doremi" else {}
    settings = {"epoch_cap": 9.0, "sizes": [50, 60, 70], "horizon": 900.0}
    clean, dirty = (make_mixer(kind, NAMES, **settings, **options) for _ in range(2))
    for step in range(1, 30):
        bad = step == 9
        clean.observe(Stats(step, [2.0, 3 * (not bad), 4], [1, not bad, 1]))
        with np.errstate(all="ignore"):
            dirty.observe(Stats(step, [2.0, 3, 4], [1, count if bad else 1, 1]))
    assert dirty.weights().tolist() == clean.weights().tolist()
    json.dumps(dirty.state_dict(), allow_nan=False)
    assert dirty.rejected_losses()[1] == (count == math.inf)  # the others are no count of anything


WRONG_MIXER = {
    "sources: 1 is not a name": {"sources": [1, 2]},
    "sources: '' is not a name": {"sources": ["", "b"]},
    "prior: expected 3 numbers, one per source: could not convert": {"prior": ["x", "y", "z"]},
    "its own: smoothing, .*did you mean 'warmup_steps'": {"warmup_step": 3},
    "mixer 'odm': an option has the wrong type": {"smoothing": "0.9"},
    "freeze_after: expected a step >= 0, got -1": {"freeze_after": -1},
    "scale: expected > 0, got nan": {"name": "exp3", "scale": math.nan},
    "expected 0 <= least <= 1 and rate > 0, got 0.0001 and inf": {
        "name": "dbl", "target": [1, 1, 1], "rate": math.inf,
    },
    "unimax: expected max_epochs > 0, got nan": {
        "name": "unimax", "sizes": [1, 2, 3], "budget": 2, "max_epochs": math.nan,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_MIXER)
def test_wrong_settings_of_a_mixer(message):
    with pytest.raises(ConfigError, match=message):
        make_mixer(**({"name": "odm", "sources": NAMES} | WRONG_MIXER[message]))


WRONG_PLANNER = {
    "planner: rows: expected an integer, got 8.0": {"rows": 8.0},
    "planner: seed: expected an integer, got None": {"seed": None},
    "planner: lag: expected an integer, got 1.5": {"lag": 1.5},
    "sizes: source 'a' has 1.5 rows; expected an integer up to 2..53": {"sizes": [1.5, 2, 3]},
    "sizes: source 'c' has 1e.18 rows; expected an integer": {"sizes": [1, 2, 1e18]},
    "exhaustion: expected a policy, or policies by source, got None": {"exhaustion": None},
}


@pytest.mark.parametrize("message", WRONG_PLANNER)
def test_wrong_settings_of_a_planner(message):
    with pytest.raises(ConfigError, match=message):
        planner_of(**WRONG_PLANNER[message])


WRONG_STATS = {
    "steps count from 1": (0, [1, 2, 3], [1, 1, 1]),
    "Stats.step: expected an integer, 1 for the first step, got 1.5": (1.5, [1, 2, 3], [1, 1, 1]),
    "step 1: Stats.tokens is dict": (1, [1, 2, 3], {"a": 1, "b": 1, "c": 1}),
    "step 1: Stats.loss_sum is list .'x', 1, 2.; expected 3 numbers": (1, ["x", 1, 2], [1, 1, 1]),
}


@pytest.mark.parametrize("message", WRONG_STATS)
def test_wrong_stats(message):
    with pytest.raises(TrainingError, match=message):
        make_mixer("odm", NAMES).observe(Stats(*WRONG_STATS[message]))


def test_places_before_the_batch():
    with pytest.raises(TrainingError, match=r"plan.rows\(-2, 4\): expected places from 0"):
        planner_of().plan(1).rows(-2, 4)


def damaged(change):
    """A planner's state, changed."""
    state = json.loads(json.dumps(planner_of().state_dict()))
    change(state)
    return state


DAMAGE = {
    "expected a planner's state of format 1, got NoneType": None,
    "the planner's state is damaged: KeyError.'mixer'": lambda state: state.pop("mixer"),
    "the planner's state is damaged: KeyError.'read'": lambda state: state["sources"]["b"].pop(
        "read"
    ),
    "the state of mixer 'clip' is damaged: expected a mapping, got NoneType": lambda state: (
        state.update(mixer=None)
    ),
    "the state of mixer 'clip' is damaged: ValueError..shares of b": lambda state: state["mixer"][
        "sources"
    ]["b"].update(shares=math.nan),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_states_that_are_none(message):
    change = DAMAGE[message]
    with pytest.raises(CheckpointError, match=message):
        planner_of().load_state_dict(damaged(change) if change else None)
