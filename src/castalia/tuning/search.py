"""The fastest way to compute a run on this machine: sizes of micro-batches, recomputation and
compilation, measured in the real loop.

Each attempt is a process of its own (attempt.py). Sizes come first, then at the fastest size the
other choices; what has no time left is named as not tried.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from castalia.analysis.tuning.short_runs import short_run
from castalia.core.errors import ConfigError
from castalia.core.memory import available_bytes
from castalia.core.ranks import environment
from castalia.cost.estimate import device_of
from castalia.data import DataConfig, IndexedDatasetWriter
from castalia.data.curriculum import CurriculumConfig
from castalia.distributed import World
from castalia.mixing.config import MixingConfig
from castalia.monitor.config import MonitorConfig
from castalia.monitor.display import size_text
from castalia.runs.config import RunConfig
from castalia.runs.named_corpus import ensure_on_all
from castalia.runs.rows import opened_rows
from castalia.tuning.choices import (
    RECOMPUTE,
    Choice,
    expected_bytes,
    is_hopeless,
    share_of,
    sizes,
)

USABLE = 0.9
"""Share of the memory that is free now which a run may take."""
STEPS = 100_000
"""Steps of an attempt, which its time ends before."""
SYNTHETIC_ROWS = 256
"""Rows of random tokens where a config names no data; a run reads them again and again."""
ATTEMPTS = 8
"""Attempts that the seconds of a search are divided into; a start takes about as long again."""
SLOWEST = 4.0
"""An attempt may last so many times its share of the search, and START_SECONDS."""
START_SECONDS = 60.0
"""Seconds that a start may take, which imports torch and may compile blocks."""
ATTEMPT = "castalia.tuning.attempt"
"""The module that an attempt runs."""
FEWEST = 3
"""Steps of an attempt, at least."""
POLL_SECONDS = 0.05
"""Time between two looks at the memory of an attempt."""
ALIKE = 0.98
"""Share of the fastest rate from which a choice counts as equally fast."""


@dataclass
class Result:
    """What is known of a choice."""

    choice: Choice
    expected: int
    """Bytes by the estimate."""
    status: str = "not tried"
    """measured, too large, out of memory, failed or not tried."""
    note: str = ""
    """Why, in words."""
    rates: list[float] = field(default_factory=list)
    """Tokens a second of each step that was measured, as the whole run would have them."""
    rate: float = 0.0
    """Their median."""
    peak: int = 0
    """Bytes of memory at the peak."""

    @property
    def spread(self) -> float:
        """Half of what lies between the slowest and the fastest step, as a share of the rate."""
        if not self.rate:
            return 0.0
        return (max(self.rates) - min(self.rates)) / 2 / self.rate


@dataclass
class Tuned:
    """A search and its outcome."""

    config: RunConfig
    device: str
    limit: int | None
    """Bytes that a process may take; None where nobody knows."""
    rows: str
    """What was read, in words."""
    results: list[Result]
    """In the order of the search."""

    @property
    def best(self) -> Result | None:
        """The fastest that fits, and of equally fast ones that with the least memory."""
        fitting = [each for each in self.results if each.status == "measured"]
        fastest = max((each.rate for each in fitting), default=0.0)
        alike = [each for each in fitting if each.rate >= ALIKE * fastest]
        return min(alike, key=lambda each: each.peak, default=None)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        results = []
        for each in self.results:
            plain = dict(vars(each)) | {"spread": each.spread}
            results.append(plain | {"choice": each.choice._asdict()})
        best = self.best
        return {
            "device": self.device,
            "limit": self.limit,
            "rows": self.rows,
            "results": results,
            "best": None if best is None else best.choice.overrides(self.config),
        }


def tune(
    config: RunConfig,
    *,
    seconds: float,
    memory: int | None = None,
    told: Callable[[Result], object] = lambda result: None,
) -> Tuned:
    """Measure the choices of a run for about `seconds`; `told` hears of each as it is known.

    memory  bytes that a process may take; None is most of what is free now.
    Raises  ConfigError for a run of several ranks, a layout that one cannot stand for, or data that
            cannot be read.
    """
    if environment()[1] > 1:
        raise ConfigError("tune runs in one process; start it without a launcher")
    share_of(config)
    device = device_of(config.workload)
    if device == "cuda" and not torch.cuda.is_available():
        device = "cpu"
    limit = memory or free_bytes(device)
    with TemporaryDirectory(prefix="castalia-tune-") as folder:
        ready, rows = with_rows(config, folder)
        search = Search(config, ready, device, limit, seconds, told)
        search.run()
    return Tuned(config, device, limit, rows, search.results)


def free_bytes(device: str) -> int | None:
    """Most of what this machine, or its GPU, can give now."""
    if device == "cuda":
        return int(USABLE * torch.cuda.mem_get_info()[0])
    free = available_bytes()
    if free is None:
        return None
    return int(USABLE * free)


def with_rows(config: RunConfig, folder: str) -> tuple[RunConfig, str]:
    """The config of an attempt, with rows that are prepared once, and what rows they are.

    Raises  ConfigError if a loss needs rows of a kind that nobody named.
    """
    run = short_run(config, STEPS, folder)
    plain = run.parallel.model_copy(update={"dp_replicate": 1, "dp_shard": None})
    train = run.train.model_copy(update={"batch_ramp": None, "batch_size": share_of(config)})
    # A mixer decides by losses, which say nothing here, and may need references.
    update: dict[str, Any] = {"parallel": plain, "train": train, "mixing": MixingConfig()}
    # Rows of full length: those of a curriculum's start are faster.
    update["curriculum"] = CurriculumConfig()
    # Statistics of some steps would count as a part of each.
    update["monitor"] = MonitorConfig()
    if config.adapter.kind == "none":
        # What weights are worth does not change how long they take.
        update["model"] = config.model.without_start()
    run = run.model_copy(update=update)
    data = config.data
    if not (data.corpus or data.train_prefixes or any(getattr(data, name) for name in data.texts)):
        if config.loss.kind != "next_token":
            raise ConfigError(
                f"loss.kind={config.loss.kind} learns from rows of its own kind; name the data"
            )
        return run.model_copy(update={"data": synthetic(run, folder)}), "random tokens"
    world = World.start(plain, config.device)
    try:
        run = ensure_on_all(run, world)
    finally:
        world.close()
    run, _ = opened_rows(run)
    return run, "rows of the run"


def synthetic(config: RunConfig, folder: str) -> DataConfig:
    """Random tokens in rows of the run's length."""
    size = config.model.vocab_size
    random = np.random.default_rng(0)
    prefix = Path(folder) / "random"
    # The narrowest that holds the ids, as `castalia prepare` chooses it.
    dtype = "int32"
    if size <= 2**16:
        dtype = "uint16"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for _ in range(SYNTHETIC_ROWS):
            writer.add(random.integers(0, size, config.data.seq_length + 1))
    return DataConfig(train=[str(prefix)], seq_length=config.data.seq_length)


class Search:
    """The attempts of one search, in order."""

    def __init__(
        self,
        config: RunConfig,
        ready: RunConfig,
        device: str,
        limit: int | None,
        seconds: float,
        told: Callable[[Result], object],
    ) -> None:
        self.config = config
        self.ready = ready
        self.device = device
        self.limit = limit
        self.until = time.monotonic() + seconds
        self.seconds = seconds
        self.told = told
        self.results: list[Result] = []

    def run(self) -> None:
        """Sizes first, then the other choices at the fastest size."""
        first = self.precisions()[0]
        slower = 0
        fastest = 0.0
        for micro in self.sizes():
            result = self.try_size(micro, first)
            if result.rate < fastest:
                slower += 1
            fastest = max(fastest, result.rate)
            # The time is better spent on the other choices.
            if slower == 2:
                break
        for choice in self.variations():
            self.attempt(choice)

    def sizes(self) -> list[int]:
        """The config's own size, so that no outcome is worse than it, then the largest first."""
        found = sizes(self.config)[::-1]
        own = self.config.train.micro_batch_size or found[0]
        return sorted(found, key=lambda size: size != own)

    def try_size(self, micro: int, precision: str) -> Result:
        """Try a size that keeps all activations, or where that does not fit, fewer of them."""
        result = None
        for recompute in RECOMPUTE:
            result = self.attempt(Choice(micro, recompute, False, precision))
            if result.status not in ("too large", "out of memory"):
                break
        assert result is not None
        return result

    def variations(self) -> Iterator[Choice]:
        """One change at a time of the best so far."""
        for precision in self.precisions()[1:]:
            yield from self.changed(precision=precision)
        yield from self.changed(compile=True)
        for recompute in (*RECOMPUTE, self.config.train.recompute):
            yield from self.changed(recompute=recompute)

    def changed(self, **changes: Any) -> Iterator[Choice]:
        """The best choice so far with a change, unless that is known already."""
        best = Tuned(self.config, self.device, self.limit, "", self.results).best
        if best is None:
            return
        choice = best.choice._replace(**changes)
        if all(each.choice != choice for each in self.results):
            yield choice

    def precisions(self) -> list[str]:
        """Those that the config leaves open."""
        if self.config.precision != "auto":
            return [self.config.precision]
        # The likelier winner first: the time may not suffice for both.
        if self.device == "cpu":
            return ["fp32", "bf16"]
        return ["bf16", "fp32"]

    def attempt(self, choice: Choice) -> Result:
        """The result of a choice: an estimate, or a process that tries it."""
        result = Result(choice, expected_bytes(self.ready, choice, self.device))
        self.results.append(result)
        if is_hopeless(result.expected, self.limit):
            result.status = "too large"
            result.note = f"estimated {size_text(result.expected)}"
        elif time.monotonic() > self.until:
            result.note = "no time left; raise --seconds"
        else:
            answer = self.process(choice)
            if "rates" in answer:
                result.status = "measured"
                result.rates = answer["rates"]
                result.rate = answer["rate"]
                result.peak = answer["peak"]
            else:
                result.status = answer["status"]
                result.note = answer["note"]
        self.told(result)
        return result

    def process(self, choice: Choice) -> dict[str, Any]:
        """Run an attempt; its result, or its status and a note."""
        share = share_of(self.config)
        passes = share // choice.micro
        run = choice.applied(self.ready)
        # Two micro-batches show what adding up gradients costs; a step of more is computed.
        rows = choice.micro * min(2, passes)
        train = run.train.model_copy(update={"batch_size": rows})
        tokens = share * self.config.rows_per_place * self.config.data.seq_length
        request = {
            "config": run.model_copy(update={"train": train}).model_dump(mode="json"),
            "seconds": self.seconds / ATTEMPTS / 2,
            "memory": self.limit,
            "passes": passes,
            "tokens": tokens,
        }
        return answer_of(
            json.dumps(request),
            self.limit if self.device == "cpu" else None,
            START_SECONDS + SLOWEST * self.seconds / ATTEMPTS,
        )


def answer_of(request: str, limit: int | None, patience: float) -> dict[str, Any]:
    """Start the process of an attempt and wait for its answer, at most `patience` seconds."""
    command = [sys.executable, "-m", ATTEMPT]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    guard = MemoryGuard(process, limit)
    guard.start()
    try:
        out, _ = process.communicate(request, timeout=patience)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "note": f"no {FEWEST} steps within {patience:.0f} s"}
    finally:
        # Also on a Ctrl-C: nothing is left behind.
        if process.poll() is None:
            process.kill()
        process.wait()
        guard.join()
    return read_answer(out, process.returncode, guard, limit)


def read_answer(
    out: str, returncode: int, guard: "MemoryGuard", limit: int | None
) -> dict[str, Any]:
    """What a process that has ended says, or how it ended."""
    if guard.exceeded and limit is not None:
        note = f"took {size_text(guard.exceeded)} of {size_text(limit)}"
        return {"status": "out of memory", "note": note}
    if returncode == -signal.SIGKILL:
        return {"status": "out of memory", "note": "the system ended it"}
    try:
        answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"status": "failed", "note": f"exit status {returncode}"}
    if answer.get("out_of_memory"):
        return {"status": "out of memory", "note": "the allocator refused"}
    if "error" in answer:
        return {"status": "failed", "note": answer["error"][0]}
    return answer


class MemoryGuard(threading.Thread):
    """Ends a process that takes more memory than it may, before the machine swaps."""

    def __init__(self, process: "subprocess.Popen[str]", limit: int | None) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.limit = limit
        self.exceeded = 0
        """Bytes that it had when it was ended."""

    def run(self) -> None:
        """Look until the process has ended."""
        while self.limit is not None and self.process.poll() is None:
            taken = resident(self.process.pid)
            if taken > self.limit:
                self.exceeded = taken
                self.process.kill()
                return
            time.sleep(POLL_SECONDS)


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 where Linux's /proc does not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        line = next(line for line in text.splitlines() if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
