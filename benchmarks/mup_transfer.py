"""Transfer of the best learning rate between widths, under μP and without it.

    python benchmarks/mup_transfer.py [--widths 64,128,256,512] [--steps N] [--json FILE]

A decoder of two layers and four heads trains on bytes with the same rows at every width and every
learning rate of a grid by factors of two, in the loop of `castalia train`. Measured is the mean
training loss of the last quarter of the steps, in nats. Under μP the best rate of the narrowest
width should be that of all; without it the best rate falls with the width. What a transfer costs
is the loss of the widest model at the narrow model's best rate, less that at its own. Takes about
five minutes on two idle cores.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

from castalia.analysis.tuning.chart import Panel, write_chart
from castalia.analysis.tuning.coord_check import MUP, STANDARD, variant
from castalia.core.errors import TrainingError
from castalia.core.files import write_json
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.runs.config import RunConfig
from castalia.runs.named_corpus import ensure_on_all
from castalia.train.hooks import Hook, Step
from castalia.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
POWERS = range(-11, -3)
"""Learning rates as powers of two: 0.0005 to 0.06."""
SHAPE = (
    *("model.num_layers=2", "model.num_attention_heads=4", "data.seq_length=64"),
    *("schedule.name=linear", "schedule.warmup=0.1", "train.batch_size=6"),
)
BROKEN = 99.0
"""Stands for the loss of a run that ended in NaN."""

Losses = dict[str, dict[int, dict[float, float]]]
"""Parametrization -> width -> learning rate -> loss."""


def main() -> None:
    """Train all runs, print a table, write JSON and a picture."""
    options = read_options()
    began = time.perf_counter()
    widths = [int(word) for word in options.widths.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        losses = measure(folder, widths, options.steps)
    seconds = round(time.perf_counter() - began, 1)
    for kind, by_width in losses.items():
        print_table(kind, by_width)
    summary = {kind: transfer(by_width) for kind, by_width in losses.items()}
    for kind, values in summary.items():
        print(
            f"{kind}: best rate at {widths[0]} {values['narrow']:.4g}, at {widths[-1]}"
            f" {values['wide']:.4g}; taken over it costs {values['cost']:.4f} nats"
        )
    result = {
        "machine": describe(),
        "steps": options.steps,
        "seconds": seconds,
        "losses": losses,
        "transfer": summary,
    }
    write_json(options.json, result)
    panels = [picture_of(kind, by_width) for kind, by_width in losses.items()]
    write_chart(options.json.with_suffix(".svg"), [panels], "Loss by learning rate and width")
    print(f"{seconds:.0f} s; written to {options.json}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Transfer of the learning rate by width.")
    parser.add_argument("--widths", default="64,128,256,512", help="hidden sizes")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "mup_transfer.json")
    return parser.parse_args()


def measure(folder: str, widths: list[int], steps: int) -> Losses:
    """The loss of every run; the rows are those of one corpus, in one order."""
    words = ["debug", *SHAPE, f"model.hidden_size={widths[0]}", f"train.steps={steps}"]
    config = load_config([*words, f"output={folder}/run"])
    world = World.start(config.parallel, "cpu")
    config = ensure_on_all(config, world)
    losses: Losses = {MUP: {}, STANDARD: {}}
    for kind, by_width in losses.items():
        for width in widths:
            model = variant(config.model, kind, width, widths[0])
            own = config.model_copy(update={"model": model})
            by_width[width] = {2.0**power: loss_at(own, 2.0**power, world) for power in POWERS}
            best = min(by_width[width].values())
            print(f"{kind}, width {width}: best loss {best:.3f}", flush=True)
    world.close()
    return losses


class Last(Hook):
    """Keeps the losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, step: Step) -> None:
        """One more."""
        self.losses.append(float(step.metrics["loss"]))


def loss_at(config: RunConfig, lr: float, world: World) -> float:
    """Mean loss over the last quarter of a run at a peak rate."""
    optim = config.optim.model_copy(update={"lr": lr})
    last = Last()
    trainer = Trainer(config.model_copy(update={"optim": optim}), world, hooks=[last])
    try:
        trainer.fit()
    except TrainingError:
        return BROKEN
    tail = last.losses[-max(1, len(last.losses) // 4) :]
    return round(sum(tail) / len(tail), 4)


def best_rate(losses: dict[float, float]) -> float:
    """The rate of the lowest loss."""
    return min(losses, key=losses.__getitem__)


def transfer(by_width: dict[int, dict[float, float]]) -> dict[str, Any]:
    """Best rates of the narrowest and the widest model, and the cost of taking over the first."""
    narrow = best_rate(by_width[min(by_width)])
    widest = by_width[max(by_width)]
    wide = best_rate(widest)
    return {
        "narrow": narrow,
        "wide": wide,
        "factor": wide / narrow,
        "cost": round(widest[narrow] - widest[wide], 4),
        "best_rates": {str(width): best_rate(losses) for width, losses in by_width.items()},
    }


def print_table(kind: str, by_width: dict[int, dict[float, float]]) -> None:
    """A row for each rate, a column for each width, the best loss of a column marked."""
    print(f"\n{kind}\n{'rate':>9}" + "".join(f"{width:>10}" for width in by_width))
    for rate in next(iter(by_width.values())):
        cells = [
            f"{losses[rate]:>9.3f}{'*' if rate == best_rate(losses) else ' '}"
            for losses in by_width.values()
        ]
        print(f"{rate:>9.4g}{''.join(cells)}")


def picture_of(kind: str, by_width: dict[int, dict[float, float]]) -> Panel:
    """A line for each width."""
    lines = {
        f"width {width}": [(rate, loss) for rate, loss in losses.items() if loss < BROKEN]
        for width, losses in by_width.items()
    }
    return Panel(kind, lines, "learning rate", "loss", log_y=False)


if __name__ == "__main__":
    main()
