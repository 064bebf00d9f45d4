"""train.products: measured once in the life of a run, the same on all ranks, kept at a resume."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.machine import onednn
from castalia.products import OnednnLinear, linear
from castalia.recipes import load_config
from castalia.runs import machine_products
from castalia.runs.machine_products import expected_products, with_products
from castalia.train.run import run

ALONE = World(0, 1, torch.device("cpu"))
needs_onednn = pytest.mark.skipif(not onednn.has_onednn(), reason="torch comes without oneDNN")


@pytest.fixture
def config_of(train, tmp_path):
    """Callable that makes the config of a small run in one folder."""

    def make(*overrides):
        return load_config([*train.base, f"output={tmp_path / 'run'}", "train.steps=2", *overrides])

    return make


@pytest.fixture
def measured(monkeypatch):
    """Callable that sets how many times as fast oneDNN is measured to be; any product is large."""
    monkeypatch.setattr(linear, "LEAST", 0)
    monkeypatch.setattr(machine_products, "LEAST", 0)
    asked = []

    def put(gain):
        def training_gain(rows):
            asked.append(rows)
            return gain

        machine = SimpleNamespace(training_gain=training_gain)
        monkeypatch.setattr(machine_products, "this_machine", lambda: machine)

    put.asked = asked
    return put


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def onednn_layers(trainer):
    return sum(type(module) is OnednnLinear for module in trainer.model.modules())


@needs_onednn
def test_a_run_keeps_the_library_it_began_with(config_of, measured, tmp_path, capsys):
    measured(1.2)
    whole = run(config_of(f"output={tmp_path / 'whole'}", "train.steps=4"), command=["castalia"])
    assert whole.config.train.products == "onednn" and measured.asked == [12 * 16]
    assert onednn_layers(whole) == 8 and whole.model.onednn
    text = capsys.readouterr().out
    assert "note: train.products=auto is onednn on this machine: products of fp32" in text
    run(config_of(), command=["castalia"])
    path = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(path.read_text())["train"]["products"] == "onednn"
    # A machine that would choose otherwise goes on with the run's own, to the same bits.
    measured(0.5)
    again = run(config_of("train.steps=4"), command=["castalia"])
    assert (again.progress.step, again.config.train.products) == (4, "onednn")
    for name, value in weights(again).items():
        assert torch.equal(value, weights(whole)[name]), name
    # The file of the run says it, too, and whoever names another library gets that.
    assert load_config([str(path)]).train.products == "onednn"
    assert with_products(config_of("train.products=torch"), ALONE).train.products == "torch"
    assert with_products(config_of("output=elsewhere"), ALONE).train.products == "torch"
    # Begun before the key existed.
    values = yaml.safe_load(path.read_text())
    del values["train"]["products"]
    path.write_text(yaml.safe_dump(values))
    measured(1.2)
    assert with_products(config_of(), ALONE).train.products == "torch"


def test_what_is_not_measured(config_of, measured, monkeypatch):
    measured(1.2)
    for override in ("precision=bf16", "parallel.tp=2"):
        assert with_products(config_of(override), ALONE).train.products == "torch"
    on_gpu = World(0, 1, torch.device("cuda"))
    assert with_products(config_of(), on_gpu).train.products == "torch"
    assert expected_products(config_of(), on_gpu.device) == "torch"
    monkeypatch.setattr(machine_products, "LEAST", 1 << 24)
    assert with_products(config_of(), ALONE).train.products == "torch"
    monkeypatch.setattr(machine_products, "LEAST", 0)
    monkeypatch.setattr(machine_products, "has_onednn", lambda: False)
    assert with_products(config_of(), ALONE).train.products == "torch"
    assert measured.asked == []
    with pytest.raises(ConfigError, match=r"train.products=onednn: torch comes without oneDNN"):
        with_products(config_of("train.products=onednn"), ALONE)
    # An estimate times a piece all the same.
    assert expected_products(config_of("train.products=onednn"), ALONE.device) == "torch"
    # Where it has no effect it is no error.
    with_products(config_of("train.products=onednn", "precision=bf16"), ALONE)


@needs_onednn
def test_a_gain_within_the_noise_changes_nothing(config_of, measured):
    measured(1.02)
    assert expected_products(config_of(), ALONE.device) == "torch"
    measured(1.1)
    assert expected_products(config_of(), ALONE.device) == "onednn"
    # A piece that is timed for precision=auto has the products of the run.
    assert expected_products(config_of("precision=auto"), ALONE.device) == "onednn"


OPPOSED = """
import os
from castalia.products import linear
from castalia.runs import machine_products
linear.LEAST = 0
machine_products.faster_products = lambda config: "torch" if int(os.environ["RANK"]) else "onednn"
"""
"""What each of two ranks would choose by itself."""


@needs_onednn
def test_ranks_agree(train, read_lines, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    train(one, "train.steps=2", "train.products=torch")
    train(two, "train.steps=2", processes=2, code=OPPOSED)
    assert yaml.safe_load((two / "config.yaml").read_text())["train"]["products"] == "onednn"
    for ours, theirs in zip(read_lines(two), read_lines(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
