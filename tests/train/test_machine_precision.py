"""precision=auto, and what is said of a precision that is slow on this machine."""

import math

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train import machine_precision, timing
from castalia.train.machine_precision import precision_notes, with_precision
from castalia.train.run import run
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def config_of(train, tmp_path):
    """Callable that makes the config of a small run in one folder."""

    def make(*overrides):
        return load_config([*train.base, f"output={tmp_path / 'run'}", "train.steps=1", *overrides])

    return make


@pytest.fixture
def measured(monkeypatch):
    """Callable that sets the factor that the machine is measured to have."""

    def put(factor):
        for module in (timing, machine_precision):
            monkeypatch.setattr(module, "times_as_long", lambda *_: factor)

    return put


def test_auto_is_measured_once_in_the_life_of_a_run(config_of, measured, tmp_path, capsys):
    measured(1.2)
    trainer = run(config_of("precision=auto"), command=["castalia"])
    assert trainer.config.precision == "bf16" == trainer.passes.precision
    assert "precision: bf16\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert "note: precision=auto is bf16 on this machine, a CPU with" in capsys.readouterr().out
    # A machine that would choose otherwise goes on with the run's own.
    measured(0.5)
    again = run(config_of("precision=auto", "train.steps=2"), command=["castalia"])
    assert (again.progress.step, again.config.precision) == (2, "bf16")
    assert Trainer(config_of("precision=auto", "output=elsewhere")).config.precision == "fp32"
    with pytest.raises(ConfigError, match="precision: 'bf16' there, 'fp32' now"):
        run(config_of("precision=fp32"), command=["castalia"])


def test_a_slow_choice_is_told_with_its_factor(config_of, measured):
    measured(57.0)
    fp16 = config_of("precision=fp16")
    (note,) = precision_notes(fp16, fp16, ALONE.device)
    assert note.startswith("precision=fp16 takes 57 times as long as fp32 on a CPU with")
    assert note.endswith("a new run with precision=fp32 or precision=auto is faster")
    fp32 = config_of()
    assert precision_notes(fp32, fp32, ALONE.device) == []
    measured(1.2)
    assert precision_notes(fp16, fp16, ALONE.device) == []


def test_the_factor_is_measured_on_the_model(config_of):
    """Both ways round, of a real model; the time itself is whatever it is."""
    before = torch.random.get_rng_state()
    factor = timing.times_as_long(config_of(), "fp16", "fp32", ALONE.device)
    assert 0 < factor < math.inf
    assert torch.equal(torch.random.get_rng_state(), before)
    assert with_precision(config_of("precision=fp16"), ALONE).precision == "fp16"


def test_a_reward_model_is_measured_by_its_scores():
    words = ["debug", "model.num_layers=1", "model.hidden_size=32", "data.seq_length=8"]
    config = load_config(
        [*words, "model.head=score", "loss.kind=reward", "data.pairs=a", "data.packing=unpacked"]
    )
    assert timing.times_as_long(config, "fp16", "fp32", ALONE.device) > 0
