"""Policies for NaN steps and loss spikes: stop, skip the step, or roll back and skip it.

All ranks act on one verdict, the worst of any rank. A skipped step consumes its rows, so that the
order of later rows does not move, and makes no update. Every decision is a line of events.jsonl
before it is acted on, and part of each later checkpoint: a resumed run skips the same steps.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

from castalia.checkpoint import Store
from castalia.core.errors import TrainingError
from castalia.data import Batch
from castalia.distributed import World
from castalia.runs.config import GuardConfig
from castalia.train.events import EVENTS, append_event, finite, in_words, ranges, read_events, warn
from castalia.train.totals import StepTotals


class Verdict(IntEnum):
    """The judgment of one rank; the larger is the worse, so that a maximum over ranks decides."""

    GOOD = 0
    SPIKE = 1
    OVERFLOW = 2
    NAN = 3
    NO_TARGETS = 4


class Action(Enum):
    """What every rank does with the step."""

    UPDATE = "update"
    OVERFLOW = "lower the loss scale, without an update"
    SKIP = "skip"
    ROLLBACK = "rollback"
    NO_TARGETS = "no targets"


class Guard:
    """Judges each step before its update; see GuardConfig.

    scaled   whether the loss is scaled (fp16).
    skips    step -> why it is skipped: asked (by the config), nan or spike.
    returns  the checkpoints that the run rolled back to, one entry a rollback; 0 is the start.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        world: World,
        store: Store,
        output: str | Path,
        scaled: bool = False,
    ) -> None:
        self.config = config
        self.scaled = scaled
        self.world = world
        self.store = store
        self.output = Path(output)
        self.skips: dict[int, str] = dict.fromkeys(config.skip_steps, "asked")
        self.returns: list[int] = []
        self.in_a_row = 0
        self.warned = False
        self.window: dict[str, deque[float]] = {
            name: deque(maxlen=config.spike_window) for name in ("loss", "grad_norm")
        }

    def judge(self, totals: StepTotals) -> Verdict:
        """This rank's verdict.

        An infinite gradient under a finite loss is an overflow when the loss is scaled: fp16 ran
        out of range, which the loss scale exists to correct.
        """
        # Every rank has the same sum of weights. The zero gradient would be an update all the same:
        # Adam's moments and the weight decay move every weight without one.
        if not totals.weight:
            return Verdict.NO_TARGETS
        # The loss first: its NaN makes every gradient NaN, which no loss scale can mend.
        if not math.isfinite(totals.loss):
            return Verdict.NAN
        if not math.isfinite(totals.norm):
            return Verdict.OVERFLOW if self.scaled else Verdict.NAN
        if self.config.spike == "ignore":
            return Verdict.GOOD
        values = {"loss": totals.loss, "grad_norm": totals.norm}
        if any(self.is_spike(name, values[name]) for name in self.config.spike_of):
            return Verdict.SPIKE
        return Verdict.GOOD

    def is_spike(self, name: str, value: float) -> bool:
        """Whether the value is more than spike_sigma standard deviations above the window's mean.

        False until the window is half full: a deviation of few values is mostly chance.
        """
        window = self.window[name]
        if len(window) < max(2, self.config.spike_window // 2):
            return False
        limit = self.config.spike_sigma * statistics.stdev(window)
        return value > statistics.fmean(window) + limit

    def answer(
        self, verdict: Verdict, step: int, totals: StepTotals, micro_batches: Sequence[Batch]
    ) -> Action:
        """The action for the step just computed. Anything but an update is logged first.

        Raises  TrainingError, on all ranks, when the run is to stop.
        """
        # Normal under fp16 while the scale finds its range: not an event, and not a skip.
        if verdict is Verdict.OVERFLOW:
            return Action.OVERFLOW
        if verdict is Verdict.NO_TARGETS:
            self.report_no_targets(step, micro_batches)
            return Action.NO_TARGETS
        policy = "ignore"
        if verdict is Verdict.NAN:
            policy = self.config.nan
        elif verdict is Verdict.SPIKE:
            policy = self.config.spike
        if policy != "ignore":
            self.decide(policy, verdict.name.lower(), step, totals, micro_batches)
        if policy in ("ignore", "warn"):
            # Only updates enter the window: a spike that was skipped must not raise the limit.
            self.in_a_row = 0
            self.window["loss"].append(totals.loss)
            self.window["grad_norm"].append(totals.norm)
            return Action.UPDATE
        if policy == "rollback":
            return Action.ROLLBACK
        # Without a limit a broken run would skip to its last step and look finished.
        self.in_a_row += 1
        if self.in_a_row > self.config.max_skips:
            raise TrainingError(
                f"step {step}: {self.in_a_row} consecutive steps were skipped, over"
                f" guard.max_skips={self.config.max_skips}; look at {EVENTS}, lower optim.lr, or"
                " set guard.nan=rollback"
            )
        return Action.SKIP

    def report_no_targets(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Warn of the first step without a target; metrics.jsonl has them all."""
        if self.warned:
            return
        self.warned = True
        rows = self.world.union(int(row) for batch in micro_batches for row in batch.index)
        if self.world.leads:
            warn(
                f"no targets at step {step} (rows {ranges(rows)} of the data order): none of"
                " their tokens is a target; skipped without an update, as is every such step"
            )

    def decide(
        self,
        policy: str,
        kind: str,
        step: int,
        totals: StepTotals,
        micro_batches: Sequence[Batch],
    ) -> None:
        """Log the decision and prepare it.

        Raises  TrainingError when the policy is to stop, or a rollback has no checkpoint.
        """
        # Every rank holds some of the rows; the message names them all, for a look at the data.
        rows = self.world.union(int(row) for batch in micro_batches for row in batch.index)
        what = in_words(kind, totals.loss, totals.norm)
        where = f"{what} at step {step} (rows {ranges(rows)} of the data order)"
        event: dict[str, Any] = {"step": step, "event": kind, "action": policy}
        event |= {"loss": finite(totals.loss), "grad_norm": finite(totals.norm), "rows": rows}
        if policy in ("stop", "rollback"):
            # The checkpoint being written may be the one to name or to roll back to.
            self.store.wait()
        # Logged before the exception: the file tells why the run ended.
        if policy == "stop":
            self.log(event)
            raise TrainingError(f"{where}; {self.advice(step)}")
        consequence = "the update is made all the same"
        if policy == "skip":
            event["skips"] = [step]
            self.skips[step] = kind
            consequence = "skipped"
        elif policy == "rollback":
            event |= self.plan_rollback(where, event)
            skipped = ranges(event["skips"])
            consequence = f"rolling back to step {event['to']}; skipped: step {skipped}"
        self.log(event)
        if self.world.leads:
            warn(f"{where}; {consequence}")

    def plan_rollback(self, where: str, event: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint to roll back to, and the steps that are skipped on the way.

        Raises  TrainingError if there is no checkpoint, or the run rolled back too often.
        """
        step = event["step"]
        # Only earlier steps: a later checkpoint was ignored as damaged when the run began.
        # Rank 0's answer counts, because another rank may see the shared folder with a delay.
        earlier = [saved for saved in self.store.steps() if saved < step]
        saved = self.world.agree(max(earlier, default=-1))
        often = self.world.agree(len(self.returns))
        if saved < 0 or often >= self.config.max_rollbacks:
            self.log(event)
            why = "no checkpoint exists to roll back to; save the start with checkpoint.steps=[0]"
            if saved >= 0:
                why = (
                    f"the run already rolled back {often} times; look at {EVENTS}, lower optim.lr,"
                    " remove the newest checkpoints to roll back further, or set"
                    f" guard.max_rollbacks={2 * often}"
                )
            raise TrainingError(f"{where}; {why}")
        # The fault may have begun some steps before it showed; none before the checkpoint counts.
        first = max(saved + 1, step - self.config.skip_before)
        skips = list(range(first, step + 1))
        self.returns.append(saved)
        self.skips |= dict.fromkeys(skips, event["event"])
        return {"to": saved, "skips": skips}

    def advice(self, step: int) -> str:
        """The end of the sentence that stops the run."""
        # Everything that the reader of this one sentence needs to act.
        saved = self.store.latest()
        good = "no checkpoint was saved yet"
        if saved is not None:
            good = f"the last good checkpoint is step {saved}"
        lower = "lower optim.lr"
        if self.scaled:
            lower = "use precision=bf16 or lower optim.lr"
        return (
            f"nothing was updated, {good}; look at these rows, skip them with"
            f" guard.skip_steps=[{step}], or {lower}"
        )

    def log(self, event: dict[str, Any]) -> None:
        """Append the event to events.jsonl; the leading rank only."""
        if self.world.leads:
            append_event(self.output, event)

    def recall(self) -> None:
        """Take over the decisions that events.jsonl has from after the checkpoint of the resume."""
        events = read_events(self.output) if self.world.leads else []
        for why in ("nan", "spike"):
            steps = []
            for event in events:
                if event["event"] == why:
                    steps += event.get("skips", ())
            # One rank reads the file and all take over its content, or they would part ways.
            self.skips = dict.fromkeys(self.world.union(steps), why) | self.skips
        returns = [event["to"] for event in events if "to" in event]
        if len(returns) > len(self.returns):
            self.returns = returns

    def state_dict(self) -> dict[str, Any]:
        """The state for a resume, as JSON values."""
        return {
            "skips": {str(step): why for step, why in sorted(self.skips.items())},
            "returns": self.returns,
            "in_a_row": self.in_a_row,
            # The key of earlier versions, whose checkpoints must load.
            "seen": {name: list(values) for name, values in self.window.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Decisions made since it was saved stay in force.

        After a rollback this loads an older checkpoint, which lacks the very decision to roll back.
        """
        self.skips = {int(step): why for step, why in state["skips"].items()} | self.skips
        # The longer list is the later one: entries are only ever added.
        self.returns = max(self.returns, state["returns"], key=len)
        self.in_a_row = state["in_a_row"]
        for name, values in state["seen"].items():
            self.window[name] = deque(values, maxlen=self.config.spike_window)
