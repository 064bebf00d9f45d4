"""A hook that the library does not have, named in the config by `module:Class`."""

import json
import sys

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.recipes import load_config
from castalia.train.run import run

HOOKS = """
from castalia.train.hooks import Hook

class Probe(Hook):
    steps = []

    def start(self, *, config, progress):
        self.steps.append(("start", progress.step, config.train.steps))

    def after_step(self, step):
        step.metrics["too_late"] = 1.0
        self.steps.append((step.number, step.last, step.tokens, step.lr == step.metrics["lr"]))

class Greedy(Hook):
    def start(self, *, trainer):
        pass

class Parametrized(Hook):
    def __init__(self, size):
        pass

class Plain:
    pass
"""


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """Callable that makes the config of a small run; `toy_hooks` can be imported."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "text", "uint16") as writer:
        for _ in range(40):
            writer.add(random.integers(97, 123, 17))
    (tmp_path / "toy_hooks.py").write_text(HOOKS)
    (tmp_path / "broken_hooks.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("toy_hooks", "broken_hooks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    base = [
        "debug",
        "model.num_layers=1",
        "model.hidden_size=16",
        "model.num_attention_heads=2",
        "data.seq_length=16",
        "train.batch_size=8",
        "train.steps=3",
        f"data.train={tmp_path / 'text'}",
        f"output={tmp_path / 'run'}",
    ]
    return lambda *overrides: load_config([*base, *overrides])


def test_a_hook_of_the_config_runs_after_the_standard_ones(config_of, tmp_path):
    run(config_of("hooks=[toy_hooks:Probe]"), command=["castalia"])
    steps = sys.modules["toy_hooks"].Probe.steps
    assert steps[0] == ("start", 0, 3)
    assert [step[:2] for step in steps[1:]] == [(1, False), (2, False), (3, True)]
    assert [step[2:] for step in steps[1:]] == [(128, True), (256, True), (384, True)]
    # The file was written before: the order is part of the contract.
    assert "too_late" not in json.loads((tmp_path / "run/metrics.jsonl").read_text().split("\n")[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such:Probe", r"cannot import the module 'no_such'"),
        ("broken_hooks:Probe", r"'broken_hooks': No module named 'no_such_package'"),
        ("toy_hooks:Prob", r"the module 'toy_hooks' has no class 'Prob'"),
        ("toy_hooks:Plain", r"Plain is not a subclass of castalia.train.hooks.Hook"),
        ("toy_hooks.Probe", r"expected module:Class"),
    ],
)
def test_a_hook_that_cannot_be_is_refused_with_the_config(config_of, name, message):
    with pytest.raises(ConfigError, match=message):
        config_of(f"hooks=[{name}]")


def test_a_hook_that_needs_arguments_or_an_unknown_service_is_named(config_of):
    with pytest.raises(ConfigError, match=r"Parametrized': must be made without arguments"):
        run(config_of("hooks=[toy_hooks:Parametrized]"), command=["castalia"])
    with pytest.raises(ConfigError, match=r"Greedy: start asks for the unknown service 'trainer'"):
        run(config_of("hooks=[toy_hooks:Greedy]"), command=["castalia"])
