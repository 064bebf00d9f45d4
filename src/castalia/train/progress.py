"""How far a run has come, and the time that its steps take."""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from castalia.data.batch import Batch
from castalia.data.step_reader import PADDING_ROW
from castalia.monitor.parts import DATA, part
from castalia.telemetry.times import Times
from castalia.train.rate import ModelRate


@dataclass
class Progress:
    """Steps taken, updates made and target tokens read.

    Skipped steps and fp16 overflows make no update, so updates may be fewer than steps.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    without_targets: int = 0
    """Steps that were skipped because no token of them was a target."""
    validation_missing: bool = False
    """Whether a request to stop broke off the validation of this step."""
    evaluation_missing: bool = False
    """Whether a request to stop broke off the evaluation of this step."""
    updates_before: int = 0
    """Updates of another run, whose optimizer state train.start_optimizer took over."""

    @property
    def optimizer_updates(self) -> int:
        """Updates behind the moments, for their bias correction; the schedule counts `updates`."""
        return self.updates_before + self.updates

    def state_dict(self) -> dict[str, int]:
        """The state for a resume, as JSON values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`."""
        self.step = state["step"]
        self.updates = state["updates"]
        self.tokens = state["tokens"]
        # Checkpoints of older versions lack these.
        self.validation_missing = bool(state.get("validation_missing"))
        self.evaluation_missing = bool(state.get("evaluation_missing"))
        self.without_targets = state.get("without_targets", 0)
        self.updates_before = state.get("updates_before", 0)


@dataclass
class Clock:
    """Wall time of the steps, and how much of it the loop waited for data."""

    data: float = 0.0
    """Seconds of waiting for data, in all."""
    waited: float = 0.0
    """Seconds of waiting for data in the current step."""
    began: float = field(default_factory=time.perf_counter)
    """When the current step began."""
    times: Times = field(default_factory=Times)
    """Times by part of a step, of the steps that are measured."""
    rate: ModelRate | None = None
    """What tokens per second are in FLOP/s."""

    def wait_for(self, batches: Iterator[list[Batch]], step: int = 0) -> list[Batch]:
        """The next item of `batches`; with it the step of that number begins."""
        self.began = time.perf_counter()
        self.times.begin(step)
        with part(DATA):
            item = next(batches)
        # The loader works ahead in threads, so this is what the model really waited.
        self.waited = time.perf_counter() - self.began
        self.data += self.waited
        return item

    def metrics(self, tokens: int) -> dict[str, float]:
        """The times of a step of so many target tokens, which ends now.

        Units  time: Unix seconds; step_seconds and data_seconds: seconds from the wait for the
               step's rows to the end of its update, and of that wait alone. Validations and saves
               are outside of the step.
        """
        # Before the clock is read: the parts are to add up to the step.
        self.times.end()
        seconds = max(1e-9, time.perf_counter() - self.began)
        rates = {} if self.rate is None else self.rate.metrics(tokens / seconds)
        return {
            "time": round(time.time(), 3),
            "step_seconds": round(seconds, 6),
            "data_seconds": round(self.waited, 6),
            "tokens_per_second": round(tokens / seconds, 1),
            **rates,
            **self.times.metrics(),
        }


def rows_hash(batches: list[Batch]) -> int:
    """Sum over the rows of the CRC-32 of their tokens as little-endian int64, without padding rows.

    A sum, because it must not depend on which rank holds which row.
    """
    total = 0
    for batch in batches:
        for row, index in zip(batch.tokens, batch.index.tolist(), strict=True):
            if index != PADDING_ROW:
                total += zlib.crc32(row.numpy().tobytes())
    return total
