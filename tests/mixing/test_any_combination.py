"""Random mixers in random wrappers over sources of any size, with bad losses and resumes."""

import json
import random

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.mixing import MIXERS, ExhaustionError, Planner, Stats, make_mixer

OWN = {
    "dbl": {"target": [2.0]},
    "doremi": {"reference": [2.0]},
    "unimax": {"budget": [50.0], "max_epochs": [1e6]},
    "ado": {"refit_every": [3, 11]},
    "progress": {"memory": [0, 50], "recent": [0, 300], "least": [0, 0.1, 1]},
}
AROUND = {
    "warmup_steps": [1, 5, 20], "update_every": [2, 7], "weight_smoothing": [0.1, 0.9],
    "floor": [0.05, 1.0],
    "max_share": [0.5, 0.7], "epoch_cap": [0.5, 3.0], "freeze_after": [0, 3, 30],
}  # fmt: skip
STEPS = 40


def settings_of(draw: random.Random, name: str) -> tuple[dict, dict]:
    """Settings of a mixer and of a planner."""
    count = draw.choice([1, 2, 5, 30])
    names = [f"s{i}" for i in range(count)]
    sizes = [draw.choice([0, 1, 2, 7, 50, 1000]) for _ in names]
    prior = [draw.choice([0.0, 1.0, 2.0, 0.001]) * (size > 0) for size in sizes]
    mixer = {key: draw.choice(values) for key, values in OWN.get(name, {}).items()}
    mixer |= {key: [mixer[key]] * count for key in ("target", "reference") if key in mixer}
    mixer |= {key: draw.choice(values) for key, values in AROUND.items() if draw.random() < 0.4}
    if sum(prior) and draw.random() < 0.5:
        mixer["prior"] = [share / sum(prior) for share in prior]
    mixer |= {
        "sources": names,
        "sizes": sizes,
        "allow_empty": True,
        "horizon": draw.choice([50.0, 1e6]),
    }
    policies = ["repeat", "drop", "cap:3", {names[0]: "cap:2"}]
    planner = {
        "sizes": sizes,
        "rows": draw.choice([1, 5, 64]),
        "lag": draw.choice([0, 1, 3]),
        "seed": 7,
    }
    return mixer, planner | {"exhaustion": draw.choice(policies), "allow_empty": True}


def take_step(planner: Planner, step: int) -> tuple:
    """Plan, check and observe a step; return what it read. One loss in ten is NaN or infinite."""
    plan, draw = planner.plan(step), random.Random(step)
    rows, sizes = plan.rows(), planner.sizes
    assert plan.counts.sum() == planner.batch and not plan.counts[sizes == 0].any()
    assert (rows.index >= 0).all() and (rows.index < sizes[rows.source]).all()
    bad = [np.nan, np.inf, 1e300, 0.0]
    losses = [draw.choice(bad) if draw.random() < 0.1 else draw.uniform(0.5, 7) for _ in sizes]
    sums = np.where(plan.counts > 0, np.array(losses) * np.maximum(plan.counts, 1), 0.0)
    planner.observe(Stats(step, sums, plan.counts, val_loss=losses if step % 5 == 0 else None))
    weights = planner.mixer.weights()
    assert np.isfinite(weights).all() and weights.min() >= 0 and abs(weights.sum() - 1) < 1e-9
    return rows.source.tolist(), rows.index.tolist(), plan.weights.tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"replay"}))
def test_any_combination(name):
    """Twelve cases: on the simplex, within the sources, and equal after a resume."""
    draw, run = random.Random(name), 0
    for _ in range(12):
        mixer, planner = settings_of(draw, name)
        try:
            first, second = (Planner(make_mixer(name, **mixer), **planner) for _ in range(2))
        except ConfigError:  # such as two sources with a largest share below a half
            continue
        cut = draw.choice([0, 1, 6, 25])
        try:
            for step in range(1, STEPS + 1):
                if step == cut + 1:
                    second.load_state_dict(
                        json.loads(json.dumps(first.state_dict(), allow_nan=False))
                    )
                read = take_step(first, step)
                assert step <= cut or take_step(second, step) == read, (mixer, planner, step)
                run += 1
        except ExhaustionError:
            pass
    assert run > 3 * STEPS
