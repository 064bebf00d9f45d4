"""Load of the experts under each way to balance them, on the corpus of the demo.

    python benchmarks/moe_balance.py [--steps N] [--json FILE]

A decoder of two layers with 8 experts each, of which a token uses 2, trains with the same rows
and start weights under every router. The router `topk` has no balance at all, then it has the
load-balancing loss, then biases that move against the load; `sinkhorn` balances the assignment of
each row. Drawn are the share of the tokens that each expert of a layer gets, and the largest share
over an equal one; written are also the losses. Nothing is dropped by any of them. Takes about four
minutes on two idle cores.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

from castalia.analysis.tuning.chart import Panel, Points, write_chart
from castalia.core.files import write_json
from castalia.data import DataConfig
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_on_all
from castalia.train.hooks import Hook, Step
from castalia.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
ROUTERS = {
    "topk, no balance": ("model.moe.balance_loss=0",),
    "topk, balance loss 0.01": ("model.moe.balance_loss=0.01",),
    "topk, bias 0.001": ("model.moe.balance_loss=0", "model.moe.bias_rate=0.001"),
    "sinkhorn": ("model.moe.balance_loss=0", "model.moe.router=sinkhorn"),
}
SHAPE = (
    *("model.num_layers=2", "model.hidden_size=64", "model.intermediate_size=96"),
    *("data.corpus=python", "data.tokenizer=null", "model.vocab_size=4096", "data.seq_length=64"),
    *("train.batch_size=6", "checkpoint.every=1000000"),
    *("checkpoint.steps=[]", "optim.lr=1e-3", "schedule.warmup=0.05"),
)
SMOOTH = 10
"""Steps that a point of the picture is the mean of."""
FULL = (0.0, 4.0)
"""None of the tokens, and all of them: each uses 2 of 8 experts."""
TAIL = 100
"""Last steps that the table is the mean of."""


class Loads(Hook):
    """Keeps what the experts did in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def after_step(self, step: Step) -> None:
        """One more."""
        self.steps.append(dict(step.metrics))


def main() -> None:
    """Train with each router, print a table, write JSON and a picture."""
    options = read_options()
    runs = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        base = load_config(["debug-moe", *SHAPE, f"output={folder}/corpus", "device=cpu"])
        world = World.start(base.parallel, "cpu")
        data = ensure_on_all(base, world).data
        for name, words in ROUTERS.items():
            runs[name] = train(f"{folder}/{len(runs)}", words, options.steps, data, world)
            summary = summary_of(runs[name])
            print(f"{name:26}" + "".join(f"  {key} {value}" for key, value in summary.items()))
        world.close()
    seconds = round(time.perf_counter() - began, 1)
    records = {name: record_of(steps) for name, steps in runs.items()}
    result = {
        "machine": describe(),
        "steps": options.steps,
        "seconds": seconds,
        "routers": records,
    }
    write_json(options.json, result)
    draw(records, options.json.with_suffix(".svg"))
    print(f"{seconds:.0f} s; written to {options.json}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load by expert under each router.")
    parser.add_argument("--steps", type=int, default=500, help="steps of each run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "moe_balance.json")
    return parser.parse_args()


def train(
    output: str, words: tuple[str, ...], steps: int, data: DataConfig, world: World
) -> list[dict[str, Any]]:
    """The metrics of every step of one run."""
    own = (f"train.steps={steps}", f"output={output}", "device=cpu")
    config = load_config(["debug-moe", *SHAPE, *words, *own])
    loads = Loads()
    Trainer(config.model_copy(update={"data": data}), world, hooks=[loads]).fit()
    return loads.steps


def mean(values: list[float]) -> float:
    """Of a list that is not empty."""
    return sum(values) / len(values)


def summary_of(steps: list[dict[str, Any]]) -> dict[str, float]:
    """The last steps in five numbers."""
    tail = steps[-TAIL:]
    layers = range(len(tail[0]["moe/layers"]))
    loads = [
        [mean([step["moe/layers"][layer]["load"][expert] for step in tail]) for expert in range(8)]
        for layer in layers
    ]
    return {
        "load_max": round(mean([step["moe/load_max"] for step in tail]), 3),
        "load_max_of_means": round(max(8 * max(load) for load in loads), 3),
        "load_min_of_means": round(min(8 * min(load) for load in loads), 3),
        "dropped": max(step["moe/dropped"] for step in steps),
        "loss": round(mean([step["loss"] for step in tail]), 4),
    }


def record_of(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON keeps: the summary, and means over SMOOTH steps each; loads of the experts of
    each layer are over an equal share."""
    layers = range(len(steps[0]["moe/layers"]))
    return {
        "last": summary_of(steps),
        "load_max": chunks([step["moe/load_max"] for step in steps]),
        "loss": chunks([step["loss"] for step in steps]),
        "load": [
            [chunks([8 * step["moe/layers"][layer]["load"][e] for step in steps]) for e in range(8)]
            for layer in layers
        ],
    }


def chunks(values: list[float]) -> list[float]:
    """The mean of each SMOOTH values."""
    begins = range(0, len(values) - SMOOTH + 1, SMOOTH)
    return [round(mean(values[begin : begin + SMOOTH]), 4) for begin in begins]


def draw(records: dict[str, dict[str, Any]], path: Path) -> None:
    """A row of panels for each layer, a column for each router, and two panels of all routers."""
    layers = range(len(next(iter(records.values()))["load"]))
    rows = [
        [
            panel(f"{name}: layer {layer}", lines_of_experts(record["load"][layer]), FULL)
            for name, record in records.items()
        ]
        for layer in layers
    ]
    worst = {name: points(record["load_max"]) for name, record in records.items()}
    losses = {name: points(record["loss"]) for name, record in records.items()}
    rows.append([panel("largest share of each step", worst), panel("training loss", losses)])
    write_chart(path, rows, "Tokens of each expert, as a multiple of an equal share")


def lines_of_experts(loads: list[list[float]]) -> dict[str, Points]:
    """A line for each expert."""
    return {f"expert {expert}": points(values) for expert, values in enumerate(loads)}


def points(values: list[float]) -> Points:
    """Each mean at the middle of its steps."""
    return [(SMOOTH * (place + 0.5), value) for place, value in enumerate(values)]


def panel(title: str, lines: dict[str, Points], span: tuple[float, float] | None = None) -> Panel:
    """Both axes are linear."""
    return Panel(title, lines, "step", log_x=False, log_y=False, span=span)


if __name__ == "__main__":
    main()
