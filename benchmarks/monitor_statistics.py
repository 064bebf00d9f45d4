"""Cost of statistics: the time of a step that measures each of them over that of the same step
without.

    python benchmarks/monitor_statistics.py [--rounds N] [--steps N] [--every K] [--size base|tiny]
                                            [--json FILE]

One small model trains in turn with each statistic measured at every step, with all of them, and
with none, blocks of steps side by side. `of a step` is what a measured step costs more, in percent;
`every K` is that over K steps, what a run pays that measures every K-th. A ratio is that of one
round, so that disturbances of the machine affect both sides.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe, in_turn, instructions, ratio

from castalia.core.files import write_json
from castalia.distributed import World
from castalia.monitor.statistics_config import StatisticsConfig
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus
from castalia.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
SIZES = {
    "base": (
        *("model.num_layers=4", "model.hidden_size=256", "model.num_attention_heads=4"),
        *("data.seq_length=256", "model.max_position_embeddings=256"),
        *("train.batch_size=8", "train.micro_batch_size=4"),
    ),
    "tiny": (
        *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
        *("data.seq_length=32", "train.batch_size=2", "train.micro_batch_size=1"),
    ),
}
NAMES = tuple(
    name.removesuffix("_every") for name in StatisticsConfig.model_fields if name.endswith("_every")
)


def main() -> None:
    """Measure, print, write JSON."""
    options = read_options()
    arms = {"none": ()} | {name: (name,) for name in NAMES} | {"all": NAMES}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: trainer_of(f"{folder}/{name}", SIZES[options.size], measured)
            for name, measured in arms.items()
        }
        batches = {name: trainer.training_batches() for name, trainer in trainers.items()}

        def block(name: str, steps: int) -> float:
            """Seconds of a step, the mean of a block."""
            trainer = trainers[name]
            began = time.perf_counter()
            for _ in range(steps):
                # As the loop does: the times of a step begin with the wait for its rows.
                number = trainer.progress.step + 1
                trainer.take_step(trainer.clock.wait_for(batches[name], number))
            return (time.perf_counter() - began) / steps

        # Once untimed: kernels are chosen and memory is taken in the first step.
        for name in arms:
            block(name, 1)
        works = {name: partial(block, name, options.steps) for name in arms}
        times = in_turn(works, options.rounds)
    result = {
        "machine": describe(),
        "instructions": instructions(),
        "size": options.size,
        "every": options.every,
        "arms": reported(times, options),
    }
    write_json(options.json, result)


def trainer_of(folder: str, overrides: tuple[str, ...], measured: tuple[str, ...]) -> Trainer:
    """A trainer without hooks, whose run is longer than any measurement."""
    every = [f"monitor.{name}_every=1" for name in measured]
    fixed = ("schedule.name=constant", "train.steps=1000000", f"output={folder}")
    config = load_config(["debug", *overrides, *fixed, *every])
    return Trainer(ensure_corpus(config, say=lambda line: None), World(0, 1, torch.device("cpu")))


def reported(times: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """Print the cost of each arm; the values for the JSON file."""
    arms = {}
    heads = f"{'ms a step':>10} {'of a step':>10} {f'every {options.every}':>10}"
    print(f"{'statistic':<18} {heads}  quartiles of {options.rounds} rounds")
    for name, values in times.items():
        over = ratio(values, times["none"])
        percent = {key: 100 * (over[key] - 1) for key in ("low", "median", "high")}
        milliseconds = 1000 * sorted(values)[len(values) // 2]
        arms[name] = {"milliseconds": milliseconds, "percent": percent}
        spread = f"{percent['low']:+.1f}% to {percent['high']:+.1f}%"
        cost = percent["median"]
        own = f"{milliseconds:>10.2f} {cost:>+9.1f}% {cost / options.every:>+9.2f}%"
        print(f"{name:<18} {own}  {spread}")
    return arms


def read_options() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of a block")
    parser.add_argument("--every", type=int, default=10, help="steps between measured ones")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    results = HERE / "results" / "monitor_statistics.json"
    parser.add_argument("--json", type=Path, default=results)
    return parser.parse_args()


if __name__ == "__main__":
    main()
