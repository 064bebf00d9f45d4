"""One attempt of `castalia tune`: a few steps of the real loop in a process of its own.

The process reads a request from its standard input and writes its result as the last line of its
output, so that one that runs out of memory ends alone.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from castalia.config.base import build
from castalia.core.memory import keep_freed_memory
from castalia.monitor import memory_bytes
from castalia.monitor.parts import BACKWARD, FORWARD, listen, unlisten
from castalia.runs.config import RunConfig
from castalia.train.hooks import Hook, Step
from castalia.train.stopping import Stop
from castalia.train.trainer import Trainer

WARM_UP = 1
"""Steps before the first that counts: they take memory, and compile blocks."""
FEWEST = 2
"""Steps that count, at least."""
FIRST_VICTIM = "1000"
"""Badness by which Linux ends this process first where memory runs out: not the user's others."""


class StepTimes(Hook):
    """Times the steps until `seconds` have passed, and what of each was in the passes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passes = 0.0
        self.count = 0
        self.steps: list[tuple[float, float]] = []
        """Seconds of a pass of one micro-batch, and of the rest of the step, of each step."""

    def start(self, *, world: Any, ask_stop: Any) -> None:
        """Begin to listen."""
        self.device = world.device
        self.ask_stop = ask_stop
        self.began = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The context of a part of the step."""
        if name not in (FORWARD, BACKWARD):
            yield
            return
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            # A pass is queued by now, not done.
            torch.cuda.synchronize(self.device)
        self.passes += time.perf_counter() - began
        self.count += name == FORWARD

    def after_step(self, step: Step) -> None:
        """Keep the times of the step, and end the run when there are enough."""
        whole = float(step.metrics["step_seconds"])
        if step.number > WARM_UP and self.count:
            self.steps.append((self.passes / self.count, whole - self.passes))
        if step.number == WARM_UP:
            self.began = time.perf_counter()
        self.passes = 0.0
        self.count = 0
        if len(self.steps) >= FEWEST and time.perf_counter() - self.began > self.seconds:
            self.ask_stop(Stop.POLITE)


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """Train what the request describes; the result as plain values.

    passes  micro-batches in a step of the whole run, for which the time of a step is computed.
    tokens  target tokens of that step.
    """
    config = build(RunConfig, request["config"], "tune")
    if request["memory"] and config.device != "cpu" and torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, request["memory"] / total))
    times = StepTimes(request["seconds"])
    listen(times.timed)
    try:
        trainer = Trainer(config, hooks=[times])
        trainer.fit()
    finally:
        unlisten(times.timed)
    rates = [
        request["tokens"] / (one_pass * request["passes"] + rest) for one_pass, rest in times.steps
    ]
    return {
        "rates": rates,
        "rate": statistics.median(rates),
        "peak": peak_bytes(trainer.world.device),
    }


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process alone."""
    if device.type == "cpu":
        # Not that of getrusage, which has the peak of the process that started this one, too.
        with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
    return memory_bytes(device)


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )


def main() -> None:
    """Answer the request on the standard input."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(FIRST_VICTIM)
    keep_freed_memory()
    request = json.load(sys.stdin)
    # What the loop prints is no result.
    result_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        result = measured(request)
    except Exception as error:
        if is_memory(error):
            result = {"out_of_memory": True}
        else:
            result = {"error": f"{error}".strip().splitlines()[-1:] or [type(error).__name__]}
    print(json.dumps(result), file=result_file, flush=True)


if __name__ == "__main__":
    main()
