"""Where the time of a step goes, by the parts of castalia.monitor.parts.

Times are exclusive: a part inside of another one is taken off it, so that the parts of a step add
up to it. On a CPU they are read from the host's clock. On a GPU the marks are CUDA events in the
stream of the passes, which cost microseconds and are read after the update of a measured step, the
one wait for the device; steps between are not synchronized.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from castalia.monitor.parts import (
    BACKWARD,
    COLLECTIVES,
    DATA,
    FORWARD,
    HEAD,
    LOSS,
    NORM,
    UPDATE,
    listen,
    unlisten,
)

OTHER = "other"
"""What no other part covers."""
STATISTICS = "statistics"
"""What measuring itself takes; parts inside of it do not count."""
NAMES = {
    DATA: "data",
    FORWARD: "forward",
    LOSS: "loss",
    HEAD: "loss",
    BACKWARD: "backward",
    NORM: "gradient_norm",
    UPDATE: "update",
    COLLECTIVES: "collectives",
    STATISTICS: STATISTICS,
}
"""Part of a step -> its name in metrics.jsonl."""


class Times:
    """A stopwatch that is off except in measured steps."""

    def __init__(self, every: int | None = None, device: torch.device | None = None) -> None:
        """`every` None never measures."""
        self.every = every
        self.on_gpu = device is not None and device.type == "cuda"
        self.running = False
        self.marks: list[tuple[str, Any]] = []
        """What begins at each moment of the step that is measured."""
        self.ended: Any = None
        self.stack = [OTHER]
        self.hooks: dict[str, float] = {}
        """Host seconds of each hook since the last measured step."""

    def begin(self, step: int) -> None:
        """The step with this number begins; it is measured where it is due."""
        self.stop()
        self.marks = []
        if self.every is None or step % self.every:
            return
        self.running = True
        self.stack = [OTHER]
        self.mark()
        listen(self.heard)

    def stop(self) -> None:
        """Measure no longer, whatever became of the step."""
        if self.running:
            unlisten(self.heard)
        self.running = False

    @contextmanager
    def heard(self, name: str) -> Iterator[None]:
        """Around a part of the step."""
        known = name_of(name)
        if known is None or STATISTICS in self.stack:
            yield
            return
        self.stack.append(known)
        self.mark()
        try:
            yield
        finally:
            self.stack.pop()
            self.mark()

    def mark(self) -> None:
        """From now on the innermost part runs."""
        self.marks.append((self.stack[-1], self.now()))

    def now(self) -> Any:
        """This moment, in seconds or as an event."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def hook(self, name: str) -> Iterator[None]:
        """Around a hook, which is outside of the step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.every is not None:
                seconds = time.perf_counter() - began
                self.hooks[name] = self.hooks.get(name, 0.0) + seconds

    def end(self) -> None:
        """The step ends now."""
        if not self.running:
            return
        self.stop()
        self.ended = self.now()
        if self.on_gpu:
            self.ended.synchronize()

    def metrics(self) -> dict[str, Any]:
        """The times of the step that ended, if it was measured, for metrics.jsonl.

        Units  seconds; `hooks` since the last measured step, those of this step not yet in it.
        """
        if not self.marks:
            return {}
        seconds: dict[str, float] = {}
        ends = [moment for _, moment in self.marks[1:]] + [self.ended]
        for (name, began), until in zip(self.marks, ends, strict=True):
            seconds[name] = seconds.get(name, 0.0) + self.between(began, until)
        times: dict[str, Any] = {name: round(value, 6) for name, value in seconds.items()}
        if self.hooks:
            times["hooks"] = {name: round(value, 6) for name, value in self.hooks.items()}
        self.hooks = {}
        self.marks = []
        return {"times": times}

    def between(self, began: Any, ended: Any) -> float:
        """Seconds between two moments."""
        if self.on_gpu:
            # elapsed_time is in milliseconds.
            return float(began.elapsed_time(ended)) / 1000
        return float(ended - began)


def name_of(marked: str) -> str | None:
    """The name of a marked part in metrics.jsonl; None for parts around several of these."""
    if marked in NAMES:
        return NAMES[marked]
    # Stages of a pipeline add their number: "forward stage 2", "backward weights stage 2".
    first, *more = marked.split(" ")
    if "stage" in more:
        return NAMES.get(first)
    return None
