"""What happens around the steps: log, save, validate, stop. Hooks run in list order."""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from castalia.core.errors import CheckpointError
from castalia.data import BlendedRows, RunRows
from castalia.data.sidecar import read_record
from castalia.distributed import is_loss
from castalia.mixing import scores
from castalia.models.flops import flops_per_token
from castalia.monitor import JsonlSink, duration, memory_bytes, peak_flops, quantity
from castalia.train.mixture import movements
from castalia.train.resume import checkpoint_state, own_tensors

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


LONG = 10.0
"""Saving and loading may take so many times the limit of the watchdog."""
PATIENCE = 1.0
"""Seconds that the save under way waits for a process that is lost."""


class Hook:
    """Does nothing; subclasses override what they need."""

    def start(self, trainer: "Trainer") -> None:
        """After the resume, before the first step."""

    def after_step(self, trainer: "Trainer") -> None:
        """After each step; `trainer.metrics` holds its numbers."""

    def rolled_back(self, trainer: "Trainer") -> None:
        """When the run went back to a checkpoint; the steps after `trainer.progress.step` run again."""

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        """When the loop ends by an exception."""

    def close(self, trainer: "Trainer") -> None:
        """At the end, in every case."""


class Metrics(Hook):
    """metrics.jsonl: one object a step."""

    sink: JsonlSink | None = None

    def start(self, trainer: "Trainer") -> None:
        """Open the file; steps that will run again are dropped from it."""
        if trainer.world.leads:
            path = Path(trainer.config.output) / "metrics.jsonl"
            self.sink = JsonlSink(path, resume_step=trainer.progress.step)

    def rolled_back(self, trainer: "Trainer") -> None:
        """Drop the steps that will run again."""
        self.close(trainer)
        self.start(trainer)

    def after_step(self, trainer: "Trainer") -> None:
        """Append the step."""
        if self.sink:
            self.sink.write(trainer.progress.step, trainer.metrics)

    def close(self, trainer: "Trainer") -> None:
        """Close the file."""
        if self.sink:
            self.sink.close()


class StepLine(Hook):
    """One line on the screen every train.log_every steps and at the first and last."""

    def start(self, trainer: "Trainer") -> None:
        """Begin to count time and tokens."""
        self.since, self.step, self.tokens = (
            time.perf_counter(),
            trainer.progress.step,
            trainer.progress.tokens,
        )
        self.data = trainer.clock.data
        self.weights = trainer.mixture.planner.mixer.prior if trainer.mixture else None
        self.flops = flops_per_token(trainer.config.model, trainer.config.data.seq_length)
        peak = peak_flops(trainer.world.device)
        self.peak = peak * trainer.world.size if peak else None

    def rolled_back(self, trainer: "Trainer") -> None:
        """Count anew."""
        self.start(trainer)

    def after_step(self, trainer: "Trainer") -> None:
        """Print, when it is time to."""
        step, last = trainer.progress.step, trainer.config.train.steps
        if trainer.world.leads and (
            step % trainer.config.train.log_every == 0 or step in (1, last)
        ):
            print(self.line(trainer), flush=True)

    def line(self, trainer: "Trainer") -> str:
        """`step 1200/143000  0.8%  loss 3.4127  ...`, averaged since the line before."""
        now, progress, metrics = time.perf_counter(), trainer.progress, trainer.metrics
        seconds = max(1e-9, now - self.since)
        speed = (progress.tokens - self.tokens) / seconds
        left = (
            (trainer.config.train.steps - progress.step)
            * seconds
            / max(1, progress.step - self.step)
        )
        data_share = (trainer.clock.data - self.data) / seconds
        mfu = f"{speed * self.flops / self.peak:.1%}" if self.peak else "n/a"
        self.since, self.step, self.tokens, self.data = (
            now,
            progress.step,
            progress.tokens,
            trainer.clock.data,
        )
        parts = [
            f"step {progress.step}/{trainer.config.train.steps}",
            f"{progress.step / trainer.config.train.steps:.1%}",
            f"loss {metrics['loss']:.4f}",
            f"gnorm {metrics['grad_norm']:.2f}",
            f"lr {metrics['lr']:.1e}",
            f"tok/s {quantity(speed)}",
            f"mfu {mfu}",
            f"mem {memory_bytes(trainer.world.device) / 2**30:.1f}GiB",
            f"data {data_share:.1%}",
            f"eta {duration(left)}",
        ]
        if "valid_loss" in metrics:
            parts.insert(3, f"valid {metrics['valid_loss']:.4f}")
        if trainer.mixture and trainer.mixture.plan and self.weights is not None:
            weights = trainer.mixture.plan.weights
            parts.append(f"mix {movements(self.weights, weights, trainer.rows.sources)}")
            self.weights = weights
        return "  ".join(parts)


class Validate(Hook):
    """Loss on the validation rows every train.eval_every steps, as `valid_loss` in the metrics.

    With several sources also `valid` and `valid_sources`: see `castalia.mixing.scores`. A mixer that learns from
    held-out losses is told them with the next step.
    """

    def after_step(self, trainer: "Trainer") -> None:
        """Run when due; the rows of one validation are the same each time."""
        every, rows = trainer.config.train.eval_every, trainer.rows
        if not every or rows.valid is None or trainer.progress.step % every:
            return
        loss, tokens = self.sums(trainer, rows.valid)
        trainer.metrics["valid_loss"] = loss.sum() / max(1.0, tokens.sum())
        paired = len(rows.valid_sources) == len(rows.sources)
        if trainer.mixture and paired:
            trainer.mixture.validated(np.where(tokens > 0, loss / np.maximum(tokens, 1), np.nan))
        if len(rows.valid_sources) > 1 and tokens.any():
            found = scores(
                rows.valid_sources,
                loss,
                tokens,
                natural=rows.tokens if paired else None,
                bytes_per_token=bytes_per_token(rows),
            )
            trainer.metrics |= {"valid_sources": found.pop("sources"), "valid": found}

    def sums(self, trainer: "Trainer", rows: BlendedRows) -> NDArray[np.float64]:
        """Loss and targets of each source over the first train.eval_batches batches of `rows`, (2, V)."""
        trainer.model.eval()
        total = torch.zeros(
            len(trainer.rows.valid_sources), 2, dtype=torch.float64, device=trainer.world.device
        )
        batches = trainer.batches(rows, 0)
        for _ in range(trainer.config.train.eval_batches):
            trainer.beat("validation")
            total += trainer.passes.run(next(batches)).per_source[: len(total)]
        trainer.model.train()
        found: NDArray[np.float64] = trainer.world.sum(total).cpu().numpy().T
        return found


def bytes_per_token(rows: RunRows) -> dict[str, float]:
    """UTF-8 bytes of text that a token of each validation file stands for, where `castalia prepare` wrote it down."""
    packs = rows.valid.row_sources if rows.valid is not None else []
    records = {
        name: read_record(pack.dataset.prefix) or {}
        for name, pack in zip(rows.valid_sources, packs, strict=True)
    }
    return {
        name: r["text_bytes"] / r["tokens"]
        for name, r in records.items()
        if r.get("text_bytes") and r.get("tokens")
    }


class Save(Hook):
    """Checkpoints by the save policy, and one at the end or when the run is asked to stop."""

    is_lost = False
    told = 0

    def start(self, trainer: "Trainer") -> None:
        """Save step 0 when the policy has it, or the run may have to go back to it."""
        self.policy = trainer.policy
        goes_back = "rollback" in (trainer.config.guard.nan, trainer.config.guard.spike)
        if trainer.progress.step == 0 and (self.policy.due(0) or goes_back):
            self.save(trainer)

    def after_step(self, trainer: "Trainer") -> None:
        """Save when due."""
        if len(trainer.store.written) > self.told:
            self.told = len(trainer.store.written)
            trainer.carried["save_seconds"] = round(trainer.store.written[-1], 4)
        if self.policy.due(trainer.progress.step) or trainer.stopping:
            self.save(trainer)

    def save(self, trainer: "Trainer") -> None:
        """Stage the state and go on; the writing happens behind."""
        trainer.beat("saving", patience=LONG)
        asynchronous = trainer.config.checkpoint.asynchronous
        timing = trainer.store.save(
            trainer.progress.step,
            own_tensors(trainer),
            checkpoint_state(trainer),
            trainer.files,
            asynchronous=asynchronous,
        )
        trainer.carried["save_stall_seconds"] = round(timing.stall_seconds, 4)

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        """Without the process that is lost, a save can only be finished if that one has written its part."""
        self.is_lost = is_loss(error)
        if self.is_lost:
            trainer.store.hurry(PATIENCE)

    def close(self, trainer: "Trainer") -> None:
        """Wait until everything is on the disk."""
        trainer.beat("saving", patience=LONG)
        with suppress(*[CheckpointError] if self.is_lost else []):  # the loss is what is told
            trainer.store.wait()


class StopOnSignal(Hook):
    """SIGTERM or SIGUSR1: finish the step, save, and leave the loop on all processes together."""

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def start(self, trainer: "Trainer") -> None:
        """Catch the signals."""

        def ask(number: int, frame: FrameType | None) -> Any:
            trainer.stop_asked = True
            print(
                f"castalia: {signal.Signals(number).name}: saving after this step",
                file=sys.stderr,
                flush=True,
            )

        self.before = {number: signal.signal(number, ask) for number in self.signals}

    def close(self, trainer: "Trainer") -> None:
        """Give the signals back."""
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)
