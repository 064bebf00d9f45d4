"""Cost of monitors: the time of a step with each of them over that of the same step without.

    python benchmarks/monitors.py [--parts sinks] [--rounds N] [--steps N] [--json FILE]

Part `sinks`: one small model, of two layers of width 256, trains on 512 tokens a step, so that a
monitor's share of a step is larger than in most runs. Blocks of steps are taken in turn, each with
the numbers going to metrics.jsonl and one sink: none, each of ours in its local form, one that
blocks for ever and one that raises at each call. After a block the sink catches up, untimed, so
that its work falls on its own steps alone. A ratio is that of one round.
Exit status 1 if metrics.jsonl or a sink that works lacks a step.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from machine import describe, in_turn, instructions, ratio, summary

from castalia.core.files import write_json
from castalia.distributed import World
from castalia.monitor.sinks import (
    SINKS,
    About,
    Sink,
    SinkConfig,
    close_sinks,
    make_sinks,
    read_metrics,
)
from castalia.monitor.sinks.follower import Follower
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus
from castalia.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
MODEL = (
    *("debug", "model.num_layers=2", "model.hidden_size=256", "model.num_attention_heads=4"),
    *("data.seq_length=128", "train.batch_size=4", "schedule.name=constant"),
)
ARMS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "tensorboard": [{"kind": "tensorboard"}],
    "wandb": [{"kind": "wandb", "mode": "offline"}],
    "comet": [{"kind": "comet", "mode": "offline"}],
    "mlflow": [{"kind": "mlflow"}],
    "trackio": [{"kind": "trackio"}],
    "blocks": [{"kind": "blocks", "patience": 0.1}],
    "raises": [{"kind": "raises", "patience": 0.1}],
}
BROKEN = ("blocks", "raises")
LONGEST = 60.0
"""Seconds in which a sink must have caught up with a block."""


@SINKS.register("blocks")
class Blocks(Sink):
    """Does not answer."""

    class Config(SinkConfig):
        """Its own kind."""

        kind: Literal["blocks"] = "blocks"

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        threading.Event().wait()


@SINKS.register("raises")
class Raises(Sink):
    """Fails each time."""

    class Config(SinkConfig):
        """Its own kind."""

        kind: Literal["raises"] = "raises"

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        raise ConnectionError("not there")


def main() -> int:
    """Measure, print, write JSON; 1 if a step was lost."""
    options = read_options()
    result = {"machine": describe(), "instructions": instructions()}
    for name in options.parts:
        result[name] = PARTS[name](options)
    write_json(options.json, result)
    return int(any(result[name].get("lost") for name in options.parts))


def sinks(options: argparse.Namespace) -> dict[str, Any]:
    """The part `sinks`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(f"{folder}/model", *MODEL)
        batches = trainer.training_batches()
        arms = {name: opened(Path(folder) / name, sections) for name, sections in ARMS.items()}
        taken: dict[str, list[int]] = {name: [] for name in arms}

        def block(name: str, steps: int) -> float:
            """Seconds of some steps with the sinks of an arm."""
            began = time.perf_counter()
            for _ in range(steps):
                step = trainer.take_step(next(batches))
                assert step is not None
                for sink in arms[name]:
                    sink.take(step.number, step.metrics)
                taken[name].append(step.number)
            seconds = time.perf_counter() - began
            if name not in BROKEN:
                catch_up(arms[name], taken[name][-1])
            return seconds / steps

        # Once untimed: a library connects, and makes its files, at the first step.
        for name in arms:
            block(name, 1)
        works = {name: partial(block, name, options.steps) for name in arms}
        times = in_turn(works, options.rounds)
        for opened_sinks in arms.values():
            close_sinks(opened_sinks)
        lost = missing(Path(folder), taken, arms)
    return reported(times, lost, options)


def trainer_of(folder: str, *overrides: str) -> Trainer:
    """A trainer without hooks, whose run is longer than any measurement."""
    config = load_config([*overrides, f"output={folder}", "train.steps=1000000"])
    return Trainer(ensure_corpus(config, say=lambda line: None), World(0, 1, torch.device("cpu")))


def opened(folder: Path, sections: list[dict[str, Any]]) -> list[Sink]:
    """The sinks of an arm, in a folder of its own."""
    configs = [SINKS[section["kind"]].Config(**section) for section in sections]
    made = make_sinks(configs, folder, About(folder.name), partial(print, file=sys.stderr))
    for sink in made:
        sink.start(0)
    return made


def catch_up(made: list[Sink], step: int) -> None:
    """Wait until every sink has the step."""
    deadline = time.monotonic() + LONGEST
    for sink in made:
        while isinstance(sink, Follower) and sink.record.delivered < step:
            assert time.monotonic() < deadline, f"{sink} is {LONGEST:g} s late"
            time.sleep(0.005)


def missing(folder: Path, taken: Mapping[str, list[int]], arms: Mapping[str, list[Sink]]) -> int:
    """Steps that a file or a sink that works does not have."""
    lost = 0
    for name, steps in taken.items():
        written = {line["step"] for line in read_metrics(folder / name / "metrics.jsonl")}
        lost += len(set(steps) - written)
        for sink in arms[name]:
            if isinstance(sink, Follower) and name not in BROKEN:
                record = json.loads(sink.record.path.read_text())
                lost += record["delivered"] != steps[-1]
    return lost


def reported(
    times: Mapping[str, list[float]], lost: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Print the times of the arms; the values for the JSON file."""
    baseline = times["none"]
    arms = {}
    print(f"{'sink':<12} {'ms a step':>10} {'of none':>9}  quartiles of {options.rounds} rounds")
    for name, values in times.items():
        own = summary(value * 1000 for value in values)
        over = ratio(values, baseline)
        arms[name] = {"milliseconds": own, "ratio": over}
        spread = f"{over['low']:.3f} to {over['high']:.3f}"
        print(f"{name:<12} {own['median']:>10.2f} {over['median']:>9.3f}  {spread}")
    print(f"steps lost: {lost}")
    return {"rounds": options.rounds, "steps": options.steps, "arms": arms, "lost": lost}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"sinks": sinks}
"""What can be measured, by name; each returns its part of the JSON file."""


def read_options() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "monitors.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
