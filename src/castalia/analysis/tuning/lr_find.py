"""The learning rate at which a run begins to learn, and the one at which it breaks.

The rate rises exponentially from step to step of the real loop.
Source  Smith 2015, arXiv:1506.01186, section 3.3.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from castalia.analysis.tuning.chart import Mark, Panel, write_chart
from castalia.analysis.tuning.short_runs import short_run
from castalia.core.errors import ConfigError, TrainingError
from castalia.distributed import World
from castalia.runs.config import RunConfig
from castalia.train.hooks import Hook, Step
from castalia.train.trainer import Trainer

BROKEN = 2.0
"""The search ends at a loss of so many times the best one."""
FEWEST = 8
"""Steps from which there is a slope."""


class Found(NamedTuple):
    """Losses by learning rate, and what follows from them."""

    rates: list[float]
    """Rate of each step, rising."""
    losses: list[float]
    """Loss of each step, nats."""
    smooth: list[float]
    """The same, each with its neighbours."""
    steepest: float
    """Rate at which the loss falls fastest."""
    lowest: float
    """Rate of the lowest loss."""
    diverged: bool
    """Whether the loss broke away before the highest rate."""

    @property
    def suggestion(self) -> float:
        """A tenth of the rate of the lowest loss, which is on the edge, in two digits."""
        return float(f"{self.lowest / 10:.1e}")

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return self._asdict() | {"suggestion": self.suggestion}


class Rising(Hook):
    """Keeps the losses, and ends the run when they break away."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def start(self, *, ask_stop: Any) -> None:
        self.ask_stop = ask_stop

    def after_step(self, step: Step) -> None:
        self.rates.append(step.lr)
        self.losses.append(float(step.metrics["loss"]))
        if self.broken:
            self.ask_stop()

    @property
    def broken(self) -> bool:
        """Whether the last loss lies far above the best one."""
        known = [loss for loss in self.losses if math.isfinite(loss)]
        last = self.losses[-1] if self.losses else 0.0
        return not math.isfinite(last) or last > BROKEN * min(known)


def find_lr(config: RunConfig, *, low: float, high: float, steps: int) -> Found:
    """Train `steps` steps from the start of the run, at rates from `low` to `high`.

    Raises  ConfigError for bounds in the wrong order, or if the loss breaks away at once.
    """
    if not 0 < low < high:
        raise ConfigError(f"the rates must rise: got {low:g} to {high:g}")
    if steps < FEWEST:
        raise ConfigError(f"a slope needs {FEWEST} steps at least, got {steps}")
    rising = Rising()
    world = World.start(config.parallel, config.device)
    broken = False
    with closing(world), TemporaryDirectory() as folder:
        trainer = Trainer(short_run(config, steps, folder), world, hooks=[rising])
        trainer.schedule = lambda n: low * (high / low) ** (n / (steps - 1))
        try:
            trainer.fit()
        except TrainingError:
            # The guard met a NaN, which is what the search is after.
            broken = True
    broken |= rising.broken
    # The step that broke away is no measurement.
    count = len(rising.losses) - (1 if rising.losses and rising.broken else 0)
    if count < FEWEST:
        raise ConfigError(
            f"the loss broke away after {count} steps, at the learning rate"
            f" {low * (high / low) ** (count / (steps - 1)):.1e}; begin lower with --from"
        )
    return judged(rising.rates[:count], rising.losses[:count], broken)


def judged(rates: Sequence[float], losses: Sequence[float], diverged: bool) -> Found:
    """What follows from the losses of rates that rise by one factor."""
    smooth = smoothed(losses, max(1, len(losses) // 20))
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    # Before the lowest loss: behind it the curve only rises.
    falls = [smooth[n + 1] - smooth[n - 1] for n in range(1, max(2, lowest))]
    steepest = 1 + min(range(len(falls)), key=falls.__getitem__)
    return Found(list(rates), list(losses), smooth, rates[steepest], rates[lowest], diverged)


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Means over neighbours, with weights that fall to 0 beyond `reach` of them on each side."""
    out = []
    for place in range(len(values)):
        near = range(max(0, place - reach), min(len(values), place + reach + 1))
        weights = [reach + 1 - abs(place - n) for n in near]
        total = sum(weight * values[n] for weight, n in zip(weights, near, strict=True))
        out.append(total / sum(weights))
    return out


def table(found: Found, rows: int = 12) -> list[list[str]]:
    """Rows of rate, loss and smoothed loss, evenly over the search."""
    last = len(found.rates) - 1
    places = sorted({round(n * last / (rows - 1)) for n in range(rows)})
    return [
        [f"{found.rates[n]:.2e}", f"{found.losses[n]:.4f}", f"{found.smooth[n]:.4f}"]
        for n in places
    ]


def write_picture(found: Found, path: str | Path) -> Path:
    """The losses by rate, with the rates that were found."""
    lines = {
        "loss": list(zip(found.rates, found.losses, strict=True)),
        "smoothed": list(zip(found.rates, found.smooth, strict=True)),
    }
    marks = [Mark(found.suggestion, "suggestion"), Mark(found.steepest, "steepest")]
    if not min(found.rates) <= found.suggestion:
        marks = marks[1:]
    panel = Panel("", lines, "learning rate", "loss", log_y=False, marks=marks)
    return write_chart(path, [[panel]], "Loss by learning rate")
