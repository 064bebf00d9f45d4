"""The `mixing:` section makes every mixer, and says what is wrong with it."""

import pytest

from castalia.config import build
from castalia.core.errors import ConfigError
from castalia.mixing import MIXERS, MixingConfig

NAMES = ["a", "b"]
NEEDED = {
    "dbl": {"target": {"a": 1.0, "b": 2.0}},
    "doremi": {"reference": {"a": 1.0, "b": 2.0}},
    "unimax": {"max_epochs": 10},
}


def kinds(mixer):
    """The mixer and what it wraps, from outside in."""
    return [mixer.kind, *(kind for inner in mixer.inner for kind in kinds(inner))]


@pytest.mark.parametrize("kind", sorted(set(MIXERS) - {"replay"}))
def test_every_kind_is_made(kind):
    config = build(
        MixingConfig, {"kind": kind, "warmup_steps": 3, "floor": 0.1} | NEEDED.get(kind, {}), "here"
    )
    mixer = config.make(NAMES, tokens=500.0, sizes=[100, 200], prior=[0.25, 0.75])
    clip = ["clip"] if kind == "odm" else []
    assert kinds(mixer) == ["warm-up", *clip, "floor", kind]
    assert mixer.weights().tolist() == [0.25, 0.75]
    assert kind in str(MixingConfig.model_fields["kind"].description)


def test_without_settings_it_is_the_prior():
    mixer = MixingConfig().make(NAMES, tokens=500.0, prior=[0.25, 0.75])
    assert mixer.kind == "static" and mixer.weights().tolist() == [0.25, 0.75]


def test_what_is_put_around(tmp_path):
    values = {
        "kind": "odm",
        "update_every": 2,
        "weight_smoothing": 0.5,
        "floor": 0.1,
        "max_share": 0.7,
    }
    config = build(
        MixingConfig, values | {"freeze_after": 9, "warmup_steps": 1, "epoch_cap": 4.0}, "here"
    )
    mixer = config.make(NAMES, tokens=500.0, sizes=[100, 200])
    kinds = []
    while mixer.inner:
        kinds.append(mixer.kind)
        mixer = mixer.inner[0]
    assert kinds == ["epoch-cap", "warm-up", "freeze", "clip", "floor", "smooth", "every"]
    assert mixer.kind == "odm"


WRONG = {
    "unknown mixer 'odmm'; choose one of ado, .*did you mean 'odm'": {"kind": "odmm"},
    "unknown option 'smoothing' of mixer 'static'; its own: none": {"smoothing": 0.9},
    "unknown option 'target' of mixer 'odm'; its own: smoothing, eps": {
        "kind": "odm",
        "target": {"a": 1.0},
    },
    "exhaustion of source 'web': expected repeat, stop, drop or cap:N epochs, got 'halt'": {
        "exhaustion": {"web": "halt"}
    },
    "floor: must be at most 1, got 2": {"floor": 2},
    "warmup_step: unknown key; did you mean '(mixing.)?warmup_steps'": {"warmup_step": 2},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_values(message):
    with pytest.raises(ConfigError, match=message):
        build(MixingConfig, WRONG[message], "here")
