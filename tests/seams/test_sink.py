"""A sink that the library does not have, named in the config."""

import json
from typing import Literal

import numpy as np
import pytest
import torch
import yaml

from castalia.config import dump_yaml
from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.monitor.sinks import SINKS, Sink, SinkConfig, flatten_metrics
from castalia.recipes import load_config
from castalia.train.hooks import Metrics
from castalia.train.trainer import Trainer


@SINKS.register("toy")
class Toy(Sink):
    """Keeps the numbers of all runs of a test."""

    class Config(SinkConfig):
        """One option."""

        kind: Literal["toy"] = "toy"
        prefix: str = ""

    lines: list = []

    def start(self, step):
        self.lines.append(f"start {step}")

    def write(self, step, metrics):
        self.lines.append((step, {self.config.prefix + name: v for name, v in metrics.items()}))

    def close(self):
        self.lines.append("close")


@pytest.fixture
def config_of(tmp_path):
    """Callable that makes the config of a run over two sources."""
    random = np.random.default_rng(0)
    for name in ("web", "code"):
        with IndexedDatasetWriter(tmp_path / name, "uint16") as writer:
            for _ in range(40):
                writer.add(random.integers(97, 123, 17))
    base = [
        "debug",
        "model.num_layers=1",
        "model.hidden_size=16",
        "model.num_attention_heads=2",
        "data.seq_length=16",
        "train.batch_size=8",
        "train.steps=2",
        f"data.train=[{tmp_path / 'web'}, {tmp_path / 'code'}]",
        f"output={tmp_path / 'run'}",
    ]
    return lambda *overrides: load_config([*base, *overrides])


def test_a_toy_sink_gets_flat_metrics_and_the_file_nested_ones(config_of, tmp_path):
    Toy.lines = []
    config = config_of("monitor.sinks=[{kind: toy, prefix: x-}]")
    Trainer(config, World(0, 1, torch.device("cpu")), hooks=[Metrics()]).fit()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert Toy.lines[0] == "start 0" and Toy.lines[-1] == "close"
    for (step, flat), record in zip(Toy.lines[1:-1], records, strict=True):
        assert step == record["step"]
        assert flat["x-loss"] == record["loss"]
        assert flat["x-sources/web/loss"] == record["sources"]["web"]["loss"]
        assert all(isinstance(value, int | float) for value in flat.values())


def test_names_and_sections_mean_the_same_and_survive_the_file(config_of):
    by_name = config_of("monitor.sinks=[toy, jsonl]")
    by_section = config_of("monitor.sinks=[{kind: toy}, {kind: jsonl}]")
    assert by_name.monitor == by_section.monitor
    again = yaml.safe_load(dump_yaml(by_name))
    assert type(by_name).model_validate(again).monitor == by_name.monitor


def test_an_unknown_sink_gets_the_menu(config_of):
    with pytest.raises(
        ConfigError, match=r"unknown sink 'toyy'; choose one of comet, jsonl.*did you mean"
    ):
        config_of("monitor.sinks=[toyy]")


def test_text_is_not_a_number():
    nested = {"loss": 1.0, "skipped": "nan", "sources": {"web": {"loss": 2.0, "tokens": 3}}}
    flat = {"loss": 1.0, "sources/web/loss": 2.0, "sources/web/tokens": 3}
    assert flatten_metrics(nested) == flat
