"""Every published rule over many steps against its formula in plain Python, by source."""

import math
import random

import numpy as np
import pytest

from castalia.mixing import Stats, make_mixer

NAMES = list("abcde")
COUNT = len(NAMES)
PRIOR = [0.3, 0.25, 0.2, 0.15, 0.1]
GOAL = [1.0, 2.0, 1.5, 3.0, 2.5]


def eps(step):
    return min(1 / COUNT, math.sqrt(math.log(COUNT) / (COUNT * step))) if step else 1 / COUNT


def softmax(scores):
    raised = [math.exp(score) for score in scores]
    return [value / sum(raised) for value in raised]


def exp3(state, step, losses, shares, val):
    """R += (loss / 10) / p of the sources drawn; Gibbs at the exploration of the update before."""
    rewards = state.setdefault("R", [0.0] * COUNT)
    for i, loss in losses.items():
        rewards[i] += loss / 10 / shares[i]
    before, state["eps"] = state.get("eps", 1 / COUNT), eps(step)
    gibbs = softmax([before * reward for reward in rewards])
    return [(1 - COUNT * eps(step)) * share + eps(step) for share in gibbs]


def odm_paper(state, step, losses, shares, val):
    """R = a R + (1 - a) loss / p; Gibbs at eps of the step before."""
    rewards = state.setdefault("R", [0.0] * COUNT)
    for i, loss in losses.items():
        rewards[i] = 0.9 * rewards[i] + 0.1 * loss / shares[i]
    gibbs = softmax([eps(step - 1) * reward for reward in rewards])
    return [(1 - COUNT * eps(step)) * share + eps(step) for share in gibbs]


def naive_validation(state, step, losses, shares, val):
    """C += (v - min) / (max - min); Gibbs at the exploration of the update before."""
    if val is None:
        return shares
    rewards = state.setdefault("C", [0.0] * COUNT)
    for i, loss in enumerate(val):
        rewards[i] += (loss - min(val)) / (max(val) - min(val))
    before, state["eps"] = state.get("eps", 1 / COUNT), eps(step)
    return [
        (1 - COUNT * eps(step)) * s + eps(step)
        for s in softmax([before * reward for reward in rewards])
    ]


def dbl(state, step, losses, shares, val):
    """w exp(v - target), normalised, a ten-thousandth spread evenly; no clamp."""
    if val is None:
        return shares
    raised = [
        share * math.exp(loss - goal) for share, loss, goal in zip(shares, val, GOAL, strict=True)
    ]
    return [(1 - 1e-4) * value / sum(raised) + 1e-4 / COUNT for value in raised]


def doremi(state, step, losses, shares, val):
    """w exp(max(loss - reference, 0)); undrawn sources keep their score; 1e-3 spread evenly."""
    scores = state.setdefault("scores", [0.0] * COUNT)
    for i, loss in losses.items():
        scores[i] = max(loss - GOAL[i], 0.0)
    raised = [share * math.exp(score) for share, score in zip(shares, scores, strict=True)]
    return [(1 - 1e-3) * value / sum(raised) + 1e-3 / COUNT for value in raised]


RULES = {
    "exp3": (exp3, {}),
    "odm-paper": (odm_paper, {}),
    "naive-validation": (naive_validation, {}),
    "dbl": (dbl, {"target": GOAL}),
    "doremi": (doremi, {"reference": dict(zip(NAMES, GOAL, strict=True))}),
}


@pytest.mark.parametrize("name", RULES)
def test_two_hundred_steps(name):
    """Between one and all of five sources drawn in a step, an evaluation every third one."""
    rule, options = RULES[name]
    mixer = make_mixer(name, sources=NAMES, prior=PRIOR, **options)
    draw, state, shares = random.Random(5), {}, list(PRIOR)
    for step in range(1, 201):
        drawn = draw.sample(range(COUNT), draw.randint(1, COUNT))
        losses = {i: draw.uniform(0.5, 6) for i in drawn}
        val = [draw.uniform(0.9, 3.3) for _ in NAMES] if step % 3 == 0 else None
        tokens = np.array([64.0 * (i in losses) for i in range(COUNT)])
        sums = np.array([losses.get(i, 0.0) for i in range(COUNT)]) * tokens
        shares = rule(state, step, losses, shares, val)
        mixer.observe(Stats(step, sums, tokens, val_loss=val))
        np.testing.assert_allclose(mixer.weights(), shares, rtol=1e-9, err_msg=f"step {step}")


def unimax(sizes, budget, epochs):
    """Algorithm 1: by increasing size, an even part of the rest, at most `epochs` times size."""
    left, out = budget, {}
    for place, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        out[i] = min(left / (len(sizes) - place), epochs * sizes[i])
        left -= out[i]
    return [out[i] / budget for i in range(len(sizes))]


def test_mixers_that_follow_sizes():
    """Twenty draws of five sizes over six decades."""
    draw = random.Random(1)
    for _ in range(20):
        sizes = [int(10 ** draw.uniform(0, 6)) for _ in NAMES]
        total, budget = sum(sizes), draw.uniform(0.1, 3.9) * sum(sizes)
        weights = make_mixer("unimax", NAMES, sizes=sizes, budget=budget, max_epochs=4).weights()
        np.testing.assert_allclose(weights, unimax(sizes, budget, 4), rtol=1e-9)
        again = make_mixer("unimax", NAMES, sizes=sizes, horizon=budget).weights()
        assert again.tolist() == weights.tolist()
        np.testing.assert_allclose(
            make_mixer("natural", NAMES, sizes=sizes).weights(), np.array(sizes) / total
        )
        for temperature in (0.5, 1.0, 3.3, 1e6):
            raised = [(size / total) ** (1 / temperature) for size in sizes]
            found = make_mixer("temperature", NAMES, sizes=sizes, temperature=temperature).weights()
            np.testing.assert_allclose(found, np.array(raised) / sum(raised), rtol=1e-9)


def test_a_temperature_near_zero_takes_the_largest():
    """Where every power but the largest vanishes."""
    assert make_mixer(
        "temperature", NAMES, sizes=[1, 2, 3, 4, 9], temperature=1e-6
    ).weights().tolist() == [
        0,
        0,
        0,
        0,
        1,
    ]
