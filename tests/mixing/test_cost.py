"""A step never loops over sources in Python; `benchmarks/mixing_cost.py` measures its time."""

import sys

import numpy as np
import pytest

from castalia.mixing import MIXERS, Planner, Stats, make_mixer


def planner_of(name: str, count: int) -> Planner:
    """A planner over `count` sources, with the mixer's defaults."""
    required = {
        "dbl": {"target": [2.0] * count},
        "doremi": {"reference": [2.0] * count},
        "unimax": {"budget": 1000.0 * count},
    }
    sizes = np.arange(1, count + 1) * 1000
    names = [f"s{i}" for i in range(count)]
    mixer = make_mixer(name, names, sizes=sizes, **required.get(name, {}))
    return Planner(mixer, sizes=sizes, rows=1024, seed=1, lag=1)


def calls_in_steps(name: str, count: int, steps: int) -> int:
    """Calls of Python and C functions while planning and observing `steps` steps."""
    planner = planner_of(name, count)
    losses = np.linspace(1, 5, count)
    tokens = np.full(count, 2048.0)
    calls = 0

    def watch(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    for step in range(1, steps + 1):
        stats = Stats(step, losses * tokens, tokens, val_loss=losses)
        sys.setprofile(watch)
        try:
            planner.plan(step)
            planner.observe(stats)
            planner.mixer.weights()
        finally:
            sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"replay"}))
def test_a_step_makes_as_many_calls_for_a_thousand_sources_as_for_ten(name):
    few = calls_in_steps(name, 10, 50)
    many = calls_in_steps(name, 1000, 50)
    # `cap` and the exhaustion limits may take a few rounds more; a loop would add 990 calls a step.
    assert 0 < many < 1.2 * few
