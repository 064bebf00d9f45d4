"""The line on the screen."""

import time
from collections.abc import Callable
from typing import Any

from castalia.data import RunRows
from castalia.distributed import World
from castalia.models.flops import flops_per_token
from castalia.monitor import duration, memory_bytes, peak_flops, quantity
from castalia.train.config import RunConfig
from castalia.train.hooks.hook import Hook, Step
from castalia.train.losses import LOSSES
from castalia.train.mixture import PlannedMixture, StaticBlend, movements
from castalia.train.progress import Clock, Progress
from castalia.train.stopping import Stop, say


class StepLine(Hook):
    """One line every train.log_every steps and at the first and last."""

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
        self.flops = flops_per_token(config.model, config.data.seq_length)
        # None on a CPU or an unknown GPU: then n/a rather than a share of a guess.
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None
        self.count_from_here()

    def count_from_here(self) -> None:
        """Average from this moment on."""
        self.since = time.perf_counter()
        self.step = self.progress.step
        self.tokens = self.progress.tokens
        self.data = self.clock.data

    def rolled_back(self, step: int) -> None:
        """Count again: the rollback is not a speed."""
        self.count_from_here()
        self.weights = self.mixture.prior

    def after_step(self, step: Step) -> None:
        """Print, when it is time to."""
        due = step.number % self.every == 0 or step.number in (1, self.steps)
        # Every rank counts, one prints. Nobody reads on: the run ends, and saves as it does.
        if self.leads and due and not say(self.line(step)):
            self.ask_stop(Stop.UNREAD)

    def line(self, step: Step) -> str:
        """`step 1200/143000  0.8%  loss 3.4127  ...`, averaged since the line before."""
        # Averages since the last line: single steps vary with saves and garbage collection.
        seconds = max(1e-9, time.perf_counter() - self.since)
        speed = (step.tokens - self.tokens) / seconds
        seconds_a_step = seconds / max(1, step.number - self.step)
        waiting = (self.clock.data - self.data) / seconds
        mfu = "n/a"
        if self.peak:
            mfu = f"{speed * self.flops / self.peak:.1%}"
        self.count_from_here()
        words = [
            f"step {step.number}/{self.steps}",
            f"{step.number / self.steps:.1%}",
            *self.losses(step.metrics),
            f"gnorm {step.metrics['grad_norm']:.2f}",
            f"lr {step.lr:.1e}",
            f"tok/s {quantity(speed)}",
            f"mfu {mfu}",
            f"mem {memory_bytes(self.device) / 2**30:.1f}GiB",
            f"data {waiting:.1%}",
            f"eta {duration((self.steps - step.number) * seconds_a_step)}",
            *self.mix(),
        ]
        return "  ".join(words)

    def losses(self, metrics: dict[str, Any]) -> list[str]:
        """The loss, the held-out loss, and the loss's own metrics."""
        words = [f"loss {metrics['loss']:.4f}"]
        if "valid_loss" in metrics:
            words.append(f"valid {metrics['valid_loss']:.4f}")
        # A skipped step has none of them.
        return words + [f"{name} {metrics[name]:.4f}" for name in self.metrics if name in metrics]

    def mix(self) -> list[str]:
        """The shares that moved since the line before."""
        plan = self.mixture.plan
        if plan is None or self.weights is None:
            return []
        text = f"mix {movements(self.weights, plan.weights, self.sources)}"
        self.weights = plan.weights
        return [text]
