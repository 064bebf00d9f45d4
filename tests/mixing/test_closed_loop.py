"""Mixer, planner and a simulated model whose losses fall by a power law of the rows read."""

import numpy as np
import pytest

from castalia.mixing import Planner, Stats, make_mixer

COUNT = 22
NAMES = [f"s{i}" for i in range(COUNT)]
FLOORS = np.linspace(0.8, 2.6, COUNT)


def follow(name, steps, *, rows=8, warmup=200, **options):
    """Weights after every step, and the losses at the end."""
    mixer = make_mixer(name, sources=NAMES, warmup_steps=warmup, **options)
    planner = Planner(mixer, sizes=[10_000] * COUNT, rows=rows, seed=3)
    read, weights = np.ones(COUNT), []
    for step in range(1, steps + 1):
        plan = planner.plan(step)
        losses = FLOORS + 4 * read**-0.4
        planner.observe(Stats(step, losses * plan.counts, plan.counts))
        read += plan.counts
        weights.append(mixer.weights())
    return np.array(weights), FLOORS + 4 * read**-0.4


def test_cold_start():
    """One step of eight draws after warm-up: only odm-repo leaves undrawn sources at eps."""
    after = {name: follow(name, 201)[0][-1] for name in ("odm-repo", "odm")}
    eps = np.sqrt(np.log(COUNT) / (COUNT * 201))
    at_the_floor = {name: int((weights < 1.01 * eps).sum()) for name, weights in after.items()}
    assert at_the_floor == {"odm-repo": COUNT - 8, "odm": 0}
    assert after["odm"].max() < 0.12 < after["odm-repo"].max()


def test_the_learned_mixture_is_in_proportion_to_perplexity():
    """Both end where the formula says; the mean of a falling loss lags a little behind."""
    for name in ("odm", "odm-repo"):
        weights, losses = follow(name, 3000, rows=32)
        eps = np.sqrt(np.log(COUNT) / (COUNT * 3000))
        goal = (1 - COUNT * eps) * np.exp(losses) / np.exp(losses).sum() + eps
        np.testing.assert_allclose(weights[-1], goal, rtol=0.05)


@pytest.mark.parametrize("name", ["odm", "exp3", "odm-paper", "ado"])
def test_no_source_is_left_behind(name):
    """Every source keeps a share that lets it learn, and every loss ends near its floor."""
    options = {"refit_every": 200} if name == "ado" else {}
    weights, losses = follow(name, 2000, rows=32, **options)
    assert weights.min() > 0.004
    assert (losses - FLOORS).max() < 0.4


def test_progress_reads_less_noise_and_learns_more():
    """13 learnable sources and noise: the share of noise drops, and the others end lower."""
    names, floors = (
        [f"s{i}" for i in range(13)] + ["noise"],
        np.append(np.linspace(0.8, 2.6, 13), 2.77),
    )
    ends, weights = {}, {}
    for name in ("uniform", "odm", "progress"):
        mixer = make_mixer(name, sources=names, warmup_steps=20 if name != "uniform" else 0)
        planner = Planner(mixer, sizes=[10_000] * 14, rows=32, seed=3)
        random, read = np.random.default_rng(0), np.ones(14)
        for step in range(1, 401):
            counts = planner.plan(step).counts
            losses = floors + np.append(np.full(13, 3.0), 0.3) * (read / 4) ** np.append(
                np.full(13, -0.3), -3.0
            )
            shown = losses + random.normal(0, 1, 14) * np.append(np.full(13, 0.4), 0.02)
            planner.observe(Stats(step, shown * counts, counts))
            read += counts
        ends[name], weights[name] = losses.mean(), mixer.weights()
    assert weights["progress"][-1] < 0.02 < 0.06 < weights["progress"][:-1].min()
    assert weights["odm"][-1] > 1 / 14
    assert ends["progress"] < min(ends["uniform"], ends["odm"])
