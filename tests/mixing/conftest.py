"""Runs of every mixer on the same made-up losses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from castalia.mixing import Mixer, Stats, make_mixer

NAMES = ("code", "books", "web", "mail", "noise")
SIZES = [400, 90, 1000, 37, 250]
OPTIONS: dict[str, dict[str, Any]] = {
    "static": {"prior": [0.4, 0.3, 0.1, 0.1, 0.1]},
    "natural": {},
    "uniform": {},
    "temperature": {"temperature": 3.0},
    "unimax": {"budget": 1500.0, "max_epochs": 2.0},
    "odm": {"warmup_steps": 5},
    "odm-repo": {"warmup_steps": 5, "smoothing": 0.5},
    "odm-paper": {"warmup_steps": 5, "update_every": 2},
    "exp3": {},
    "naive-validation": {"floor": 0.1},
    "dbl": {"target": [2.0, 2.5, 2.5, 2.0, 4.0], "max_share": 0.6},
    "doremi": {"reference": [2.0, 2.5, 2.5, 2.0, 4.0], "weight_smoothing": 0.5, "update_every": 3},
    "progress": {"warmup_steps": 4, "caution": 1.0},
    "ado": {"refit_every": 12, "epoch_cap": 3.0, "horizon": 4000.0},
}
"""Every mixer but replay, with settings that exercise what goes around it."""


@pytest.fixture(params=list(OPTIONS))
def build(request: pytest.FixtureRequest) -> Callable[..., Mixer]:
    """Makes a fresh mixer of one kind; keywords replace its settings."""

    def make(**more: Any) -> Mixer:
        return make_mixer(
            request.param, **({"sources": NAMES, "sizes": SIZES} | OPTIONS[request.param] | more)
        )

    return make


@pytest.fixture
def stats_of() -> Callable[[int, Any], Stats]:
    """The stats of a step: losses fall from 6 nats by a law of their own, noise stays."""

    def make(step: int, counts: Any) -> Stats:
        random = np.random.default_rng(step)
        floor = np.array([1.5, 2.6, 2.4, 1.0, 4.5])
        means = (
            floor
            + (6 - floor) * step ** -np.array([0.5, 0.3, 0.25, 0.6, 2.0])
            + random.normal(0, 0.05, 5)
        )
        tokens = np.asarray(counts) * 16.0
        return Stats(step, means * tokens, tokens, val_loss=means if step % 4 == 0 else None)

    return make
