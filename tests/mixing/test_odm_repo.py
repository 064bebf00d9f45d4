"""`odm-repo` against a transcription of the published code; `odm-paper` becomes uniform."""

import math
import random

import numpy as np
import pytest

from castalia.mixing import Stats, make_mixer


class Transcribed:
    """The updater in plain Python: warm-up, due steps, mean of exp(loss), shares, exploration."""

    def __init__(self, weights, alpha, warmup, frequency):
        self.count, self.alpha, self.warmup, self.frequency = len(weights), alpha, warmup, frequency
        self.reward = dict.fromkeys(range(self.count), 0.0)
        self.probability = dict(enumerate(weights))
        self.eps = 1 / self.count

    def step(self, iteration, losses):
        """`losses` of the sources drawn, by number."""
        if iteration <= self.warmup or iteration % self.frequency:
            return
        before = self.eps
        self.eps = min(1 / self.count, math.sqrt(math.log(self.count) / (self.count * iteration)))
        for name, loss in losses.items():
            self.reward[name] = self.alpha * self.reward[name] + (1 - self.alpha) * math.exp(loss)
        scale = (1 - self.count * self.eps) / sum(
            reward * before for reward in self.reward.values()
        )
        weights = {name: reward * before * scale + self.eps for name, reward in self.reward.items()}
        total = sum(weights.values())
        self.probability = {name: weight / total for name, weight in weights.items()}


@pytest.mark.parametrize(("alpha", "warmup", "frequency"), [(0.9, 0, 1), (0.5, 20, 1), (0.9, 7, 3)])
def test_every_step_equals_the_transcription(alpha, warmup, frequency):
    draw = random.Random(3)
    prior = [0.1, 0.3, 0.05, 0.25, 0.2, 0.1]
    theirs = Transcribed(prior, alpha, warmup, frequency)
    ours = make_mixer(
        "odm-repo",
        sources=list("abcdef"),
        prior=prior,
        smoothing=alpha,
        warmup_steps=warmup,
        update_every=frequency,
    )
    for step in range(1, 301):
        drawn = draw.sample(range(6), draw.randint(1, 6))
        losses = {name: draw.uniform(0.5, 8) for name in drawn}
        theirs.step(step, losses)
        tokens = np.array([32.0 if name in losses else 0.0 for name in range(6)])
        ours.observe(
            Stats(step, np.array([losses.get(name, 0.0) for name in range(6)]) * tokens, tokens)
        )
        np.testing.assert_allclose(
            ours.weights(), list(theirs.probability.values()), rtol=1e-12, err_msg=str(step)
        )


def test_the_published_formula_becomes_uniform_and_the_code_does_not():
    """22 sources with losses 1.76 nats apart: the code's weights differ by exp(1.76)."""
    losses = np.linspace(0.9, 2.66, 22)
    spread = {}
    for name in ("odm-paper", "odm-repo"):
        mixer = make_mixer(name, sources=[f"s{i}" for i in range(22)])
        for step in range(1, 20_001):
            mixer.observe(Stats(step, losses, np.ones(22)))
            if step in (2_000, 20_000):
                spread[name, step] = mixer.weights().max() / mixer.weights().min()
    assert spread["odm-paper", 20_000] < spread["odm-paper", 2_000] < 1.35
    assert spread["odm-paper", 20_000] < 1.12
    assert spread["odm-repo", 20_000] > 3


def test_warmup_of_the_repo_collects_nothing_and_ours_does():
    """After 100 steps of warm-up and one more in which one source is drawn."""
    for name, keeps in (("odm-repo", False), ("odm", True)):
        mixer = make_mixer(name, sources=["a", "b", "c"], warmup_steps=100)
        for step in range(1, 101):
            mixer.observe(Stats(step, [2.0, 2.0, 2.0], [1, 1, 1]))
            assert mixer.weights().tolist() == pytest.approx([1 / 3] * 3)
        mixer.observe(Stats(101, [2.0, 0, 0], [1, 0, 0]))
        assert bool(mixer.weights()[1] > 0.3) is keeps
