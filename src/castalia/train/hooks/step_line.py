"""The line on the screen, and the numbers of the last one."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from castalia.data import RunRows
from castalia.distributed import World
from castalia.losses import LOSSES
from castalia.monitor import duration, memory_bytes, quantity
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.mixture import PlannedMixture, StaticBlend, movements
from castalia.train.progress import Clock, Progress
from castalia.train.rate import ModelRate
from castalia.train.stopping import Stop, say

COLUMNS = 80
"""Width of a line, that of a terminal nobody has changed."""
PRIORITY = (
    ("step", "loss", "skipped", "valid"),
    ("tok/s", "eta", "lr", "gnorm", "mfu", "data", "mem", "share"),
)
"""Words that are always there, and those that are left out, the last first, for want of room. The
metrics of a loss come between the two."""


class StepLine(Hook):
    """One line every train.log_every steps and at the first and last: means since the line before.

    Steps that were skipped have no loss and no norm, and are left out of the means.
    """

    def start(
        self,
        *,
        config: RunConfig,
        world: World,
        progress: Progress,
        clock: Clock,
        rows: RunRows,
        ask_stop: Callable[[Stop], None],
        mixture: PlannedMixture | StaticBlend,
    ) -> None:
        """Begin to count time and tokens."""
        self.leads = world.leads
        self.device = world.device
        self.steps = config.train.steps
        self.every = config.train.log_every
        self.metrics = LOSSES[config.loss.kind].names
        self.progress = progress
        self.ask_stop = ask_stop
        self.clock = clock
        self.sources = rows.sources
        self.mixture = mixture
        self.weights = mixture.prior
        self.rate = ModelRate(config, world)
        self.began = time.perf_counter()
        self.began_with = progress.tokens
        # Of the last steps, for the last line: a single step's loss varies too much.
        self.losses: deque[float] = deque(maxlen=self.every)
        self.valid: float | None = None
        self.count_from_here()

    def count_from_here(self) -> None:
        """Average from this moment on."""
        self.since = time.perf_counter()
        self.step = self.progress.step
        self.tokens = self.progress.tokens
        self.data = self.clock.data
        self.sums = {name: FiniteMean() for name in ("loss", "grad_norm", *self.metrics)}
        self.skipped: list[str] = []

    def rolled_back(self, step: int) -> None:
        """Count again: the rollback is not a speed."""
        self.count_from_here()
        self.weights = self.mixture.prior

    def after_step(self, step: Step) -> None:
        """Count the step, and print when it is time to."""
        for name, average in self.sums.items():
            average.add(step.metrics.get(name, math.nan))
        if math.isfinite(loss := step.metrics["loss"]):
            self.losses.append(loss)
        if "valid_loss" in step.metrics:
            self.valid = step.metrics["valid_loss"]
        # An evaluation is no part of a step's speed.
        self.since += step.metrics.get("eval_seconds", 0.0)
        if why := step.metrics.get("skipped"):
            self.skipped.append(why)
        # Every rank counts, one prints. Nobody reads on: the run ends, and saves as it does.
        due = step.number % self.every == 0 or step.number == 1 or step.last
        if self.leads and due and not say(self.line(step)):
            self.ask_stop(Stop.UNREAD)

    def line(self, step: Step) -> str:
        """`step 1200/143000  loss 3.4127  ...`; a second line if shares of sources moved."""
        # Averages since the last line: single steps vary with saves and garbage collection.
        seconds = max(1e-9, time.perf_counter() - self.since)
        speed = (step.tokens - self.tokens) / seconds
        mfu = self.rate.mfu(speed)
        seconds_a_step = seconds / max(1, step.number - self.step)
        left = duration((self.steps - step.number) * seconds_a_step)
        words = {
            "step": f"step {step.number}/{self.steps}",
            "share": f"{step.number / self.steps:.1%}",
            "loss": f"loss {self.sums['loss'].mean:.4f}",
            "skipped": self.skips(),
            "valid": self.validation(step.metrics),
            **{f"own {name}": self.own(name) for name in self.metrics},
            "gnorm": f"gnorm {self.sums['grad_norm'].mean:.2f}",
            "lr": f"lr {step.lr:.1e}",
            "tok/s": f"tok/s {quantity(speed)}",
            "mfu": "" if mfu is None else f"mfu {mfu:.1%}",
            "mem": f"mem {memory_bytes(self.device) / 2**30:.1f}GiB",
            "data": f"data {(self.clock.data - self.data) / seconds:.1%}",
            "eta": f"eta {left}",
        }
        self.count_from_here()
        return fitted(words) + self.mix()

    def own(self, name: str) -> str:
        """A metric of the loss; empty where it has not counted anything."""
        mean = self.sums[name]
        return f"{name} {mean.mean:.4f}" if mean.count else ""

    def skips(self) -> str:
        """How many steps were skipped since the line before, and why."""
        if not self.skipped:
            return ""
        reasons = ", ".join(dict.fromkeys(self.skipped))
        return f"skipped {len(self.skipped)} ({reasons})"

    def validation(self, metrics: Mapping[str, Any]) -> str:
        """The held-out loss, if this step has one."""
        return f"valid {metrics['valid_loss']:.4f}" if "valid_loss" in metrics else ""

    def mix(self) -> str:
        """The shares that moved since the line before, on a line of their own."""
        plan = self.mixture.plan
        if plan is None or self.weights is None:
            return ""
        moved = movements(self.weights, plan.weights, self.sources)
        self.weights = plan.weights
        return "" if moved == "steady" else f"\n  mix {moved}"[:COLUMNS]

    def summary(self) -> str:
        """Loss, validation, time and speed of this start; empty if it made no step."""
        if not self.losses:
            return ""
        tokens = self.progress.tokens - self.began_with
        seconds = time.perf_counter() - self.began
        words = [f"loss {sum(self.losses) / len(self.losses):.4f}"]
        if self.valid is not None:
            words.append(f"validation {self.valid:.4f}")
        words.append(f"{quantity(tokens)} tokens in {duration(seconds)}")
        words.append(f"{quantity(tokens / max(seconds, 1e-9))} tokens/s")
        return ", ".join(words)


class FiniteMean:
    """The mean of the finite numbers among those added; NaN without one."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Count a number."""
        # An overflow of fp16 has an infinite norm, and a skipped step has none.
        if math.isfinite(value):
            self.total += value
            self.count += 1

    @property
    def mean(self) -> float:
        """The mean so far."""
        return self.total / self.count if self.count else math.nan


def fitted(words: Mapping[str, str]) -> str:
    """The words in their order, as many as fit into COLUMNS; the first of PRIORITY always."""
    always, room = PRIORITY
    own = [name for name in words if name not in (*always, *room)]
    chosen = {name for name in always if words[name]}
    length = sum(len(words[name]) + 2 for name in chosen) - 2
    for name in (*own, *room):
        if words[name]:
            length += 2 + len(words[name])
            # Not the next, shorter word: lines below each other have the same words.
            if length > COLUMNS:
                break
            chosen.add(name)
    return "  ".join(text for name, text in words.items() if name in chosen)
