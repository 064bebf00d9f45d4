"""What happens to a step whose numbers are wrong: the run stops, leaves the step out, or goes back and leaves it out.

All processes act on one verdict, the worst that any of them has seen. A step that is left out consumes its rows, so
that the order of the later ones does not move, and makes no update. Every decision is a line of events.jsonl before
anything is done about it, and a part of each later checkpoint: a resume leaves out the same steps.
"""

import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from enum import Enum, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.core.errors import DataError, TrainingError
from castalia.core.files import atomic_write, cannot_write
from castalia.monitor import read_metrics
from castalia.train.config import GuardConfig

if TYPE_CHECKING:
    from castalia.data import Batch
    from castalia.train.progress import StepTotals
    from castalia.train.trainer import Trainer

EVENTS = "events.jsonl"


class Verdict(IntEnum):
    """What one process sees in a step; the larger is the worse, and the worst counts for all."""

    GOOD = 0
    SPIKE = 1
    OVERFLOW = 2
    NAN = 3


class Action(Enum):
    """What all processes do about it."""

    UPDATE = "update"
    OVERFLOW = "lower the loss scale, without an update"
    SKIP = "skip"
    ROLLBACK = "rollback"


class Guard:
    """Judges each step before its update; see GuardConfig.

    skips    step -> why it is left out: asked (by the config), nan or spike.
    returns  the checkpoints that the run went back to, one entry a rollback; 0 is the start.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skips: dict[int, str] = dict.fromkeys(config.skip_steps, "asked")
        self.returns: list[int] = []
        self.in_a_row = 0
        self.seen: dict[str, deque[float]] = {
            name: deque(maxlen=config.spike_window) for name in ("loss", "grad_norm")
        }

    def look(self, loss: float, norm: float, scaled: bool) -> Verdict:
        """What this process sees: loss in nats a target, norm of the gradient, whether the loss was scaled (fp16).

        A gradient beyond the range of fp16 under a finite loss is an overflow, which the loss scale is there for.
        """
        if not math.isfinite(loss):
            return Verdict.NAN
        if not math.isfinite(norm):
            return Verdict.OVERFLOW if scaled else Verdict.NAN
        if self.config.spike == "ignore":
            return Verdict.GOOD
        values = {"loss": loss, "grad_norm": norm}
        return (
            Verdict.SPIKE
            if any(self.is_spike(name, values[name]) for name in self.config.spike_of)
            else Verdict.GOOD
        )

    def is_spike(self, name: str, value: float) -> bool:
        """More than spike_sigma standard deviations above the mean of the window, once that is half full."""
        seen = self.seen[name]
        if len(seen) < max(2, self.config.spike_window // 2):
            return False
        return value > statistics.fmean(seen) + self.config.spike_sigma * statistics.stdev(seen)

    def answer(
        self,
        trainer: "Trainer",
        verdict: Verdict,
        totals: "StepTotals",
        norm: float,
        micro_batches: "Sequence[Batch]",
    ) -> Action:
        """What to do about the step that was just computed; anything but an update is told and written down.

        Raises  TrainingError, on all processes, when the run is to stop.
        """
        if verdict is Verdict.OVERFLOW:
            return Action.OVERFLOW
        policy = {Verdict.NAN: self.config.nan, Verdict.SPIKE: self.config.spike}.get(
            verdict, "ignore"
        )
        if policy != "ignore":
            rows = trainer.world.union(int(row) for batch in micro_batches for row in batch.index)
            kind = verdict.name.lower()
            Event(trainer, kind, policy, totals.loss, norm, rows).act()
        if policy in ("ignore", "warn"):
            self.in_a_row = 0
            self.seen["loss"].append(totals.loss)
            self.seen["grad_norm"].append(norm)
            return Action.UPDATE
        if policy == "rollback":
            return Action.ROLLBACK
        self.in_a_row += 1
        if self.in_a_row > self.config.max_skips:
            raise TrainingError(
                f"step {trainer.progress.step + 1} is the {self.in_a_row}th in a row to be left out, and"
                f" guard.max_skips={self.config.max_skips}; look at {EVENTS}, lower optim.lr, or set guard.nan=rollback"
            )
        return Action.SKIP

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        return {
            "skips": {str(step): why for step, why in sorted(self.skips.items())},
            "returns": self.returns,
            "in_a_row": self.in_a_row,
            "seen": {name: list(values) for name, values in self.seen.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; what was decided since it was saved stays decided."""
        if not state:  # a checkpoint from before there was a guard
            return
        self.skips = {int(step): why for step, why in state["skips"].items()} | self.skips
        self.returns = max(self.returns, state["returns"], key=len)
        self.in_a_row = state["in_a_row"]
        for name, values in state["seen"].items():
            self.seen[name] = deque(values, maxlen=self.config.spike_window)

    def recall(self, trainer: "Trainer") -> None:
        """Take over what events.jsonl says was decided after the checkpoint that the run continues from."""
        events = read_events(trainer.config.output) if trainer.world.leads else []
        for why in ("nan", "spike"):
            mine = (
                step for event in events if event["event"] == why for step in event.get("skips", ())
            )
            self.skips = dict.fromkeys(trainer.world.union(mine), why) | self.skips
        if len(told := [event["to"] for event in events if "to" in event]) > len(self.returns):
            self.returns = told


class Event:
    """One decision about one step: told on the screen, and a line of events.jsonl."""

    def __init__(
        self, trainer: "Trainer", kind: str, policy: str, loss: float, norm: float, rows: list[int]
    ) -> None:
        self.trainer, self.policy, self.step = trainer, policy, trainer.progress.step + 1
        what = in_words(kind, loss, norm)
        self.where = f"{what} at step {self.step} (rows {ranges(rows)} of the data order)"
        self.record: dict[str, Any] = {"step": self.step, "event": kind, "action": policy}
        self.record |= {"loss": finite(loss), "grad_norm": finite(norm), "rows": rows}

    def act(self) -> None:
        """Write it down and say it.

        Raises  TrainingError when the policy is to stop, or there is no checkpoint to go back to.
        """
        if self.policy in ("stop", "rollback"):
            self.trainer.store.wait()
        if self.policy == "stop":
            self.write()
            raise TrainingError(self.reason_to_stop())
        if self.policy == "rollback":
            self.plan_rollback()
        elif self.policy == "skip":
            self.record["skips"] = [self.step]
            self.trainer.guard.skips[self.step] = self.record["event"]
        self.write()
        self.say(
            {"skip": "left out", "warn": "the update is made all the same"}.get(
                self.policy, "going back"
            )
        )

    def plan_rollback(self) -> None:
        """Which checkpoint the run goes back to, and which steps it then leaves out.

        Raises  TrainingError if there is no checkpoint, or the run went back too often.
        """
        trainer, guard = self.trainer, self.trainer.guard
        # A later one was passed over as damaged when the run began.
        saved = trainer.world.agree(
            max((step for step in trainer.store.steps() if step < self.step), default=-1)
        )
        often = trainer.world.agree(len(guard.returns))
        if saved < 0 or often >= guard.config.max_rollbacks:
            self.write()
            why = "there is no checkpoint to go back to; save the start with checkpoint.steps=[0]"
            if saved >= 0:
                why = (
                    f"the run went back {often} times already; look at {EVENTS}, lower optim.lr, remove the newest"
                    f" checkpoints to go back further, or set guard.max_rollbacks={2 * often}"
                )
            raise TrainingError(f"{self.where}; {why}")
        first = max(saved + 1, self.step - guard.config.skip_before)
        self.record |= {"to": saved, "skips": list(range(first, self.step + 1))}
        guard.returns.append(saved)
        guard.skips |= dict.fromkeys(self.record["skips"], self.record["event"])

    def reason_to_stop(self) -> str:
        """The sentence that ends the run."""
        saved = self.trainer.store.latest()
        good = (
            f"the last good checkpoint is step {saved}"
            if saved is not None
            else "no checkpoint was saved yet"
        )
        lower = (
            "use precision=bf16 or lower optim.lr"
            if self.trainer.scale.enabled
            else "lower optim.lr"
        )
        return (
            f"{self.where}; nothing was updated, {good}; look at these rows, leave them out with"
            f" guard.skip_steps=[{self.step}], or {lower}"
        )

    def write(self) -> None:
        """Append the line and force it to the disk; the leading process only."""
        if not self.trainer.world.leads:
            return
        path = Path(self.trainer.config.output) / EVENTS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(path, error) from error

    def say(self, what: str) -> None:
        """A line on stderr; the leading process only."""
        if self.trainer.world.leads:
            if "to" in self.record:
                what = f"going back to step {self.record['to']}; left out: step {ranges(self.record['skips'])}"
            print(f"castalia: warning: {self.where}; {what}", file=sys.stderr, flush=True)


def read_events(output: str | Path) -> list[dict[str, Any]]:
    """The decisions of a run, oldest first; none when there is no file."""
    path = Path(output) / EVENTS
    events = read_metrics(path) if path.exists() else []
    if events and not path.read_text(encoding="utf-8").endswith("\n"):  # cut off by a crash
        with atomic_write(path) as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
    if not all(isinstance(event, dict) and {"step", "event"} <= event.keys() for event in events):
        raise DataError(f"{path} has a line that is no event; each has a step and an event")
    return events


def in_words(kind: str, loss: float, norm: float) -> str:
    """What is wrong with the numbers of a step."""
    if kind == "spike":
        return f"spike: loss {loss:.4f}, gradient norm {norm:.3g},"
    if not math.isfinite(loss):
        return f"loss {loss}"
    return (
        f"gradient norm {norm}"
        if not math.isfinite(norm)
        else "a number that is not finite on another process"
    )


def ranges(numbers: Sequence[int]) -> str:
    """`24 to 35, 40`: ascending numbers in words."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


def finite(value: float) -> float | str:
    """The number; as text when JSON has none for it."""
    return value if math.isfinite(value) else str(value)
