"""What the profiler costs a step: inside a window, and the marks of its parts when it is off.

    python benchmarks/profiler.py [--layers N] [--width N] [--rows N] [--length N] [--windows N]
                                  [--json FILE]
    python benchmarks/profiler.py --quick

One run has windows of two steps with two steps outside between them, so that both kinds of steps
are timed in turns; the first of each pair is left out, because it pays for what begins or ends.
Each way to profile is a run of its own. Off, a part costs one call: its time, measured alone, times
the parts of a step is a share of the steps outside.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.data import IndexedDatasetWriter
from castalia.monitor.parts import listen, part, unlisten
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Profile, Step
from castalia.train.trainer import Trainer

WAYS = {
    "trace": (),
    "trace, shapes, FLOPs": ("profile.shapes=true", "profile.flops=true"),
    "trace, memory": ("profile.memory=true",),
    "trace, stacks": ("profile.stacks=true",),
}
"""Name -> overrides."""
FIRST = 5
"""First step of the first window; those before it warm up."""
PERIOD = 4
"""Steps from one window to the next."""
CALLS = 200_000
"""Calls by which a part is timed."""


class StepSeconds(Hook):
    """Keeps the time of each step, without what hooks take."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def after_step(self, step: Step) -> None:
        """Keep that of this step."""
        self.seconds[step.number] = float(step.metrics["step_seconds"])


def write_tokens(folder: Path, vocabulary: int) -> Path:
    """A token file of random ids."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "tokens", "uint16") as writer:
        for _ in range(64):
            writer.add(random.integers(0, vocabulary, 4096))
    return folder / "tokens"


def words_of(args: argparse.Namespace, folder: Path) -> list[str]:
    """The config of every run."""
    return [
        "debug",
        f"output={folder}/run",
        f"data.train={write_tokens(folder, 256)}",
        f"data.seq_length={args.length}",
        f"model.max_position_embeddings={args.length}",
        f"model.num_layers={args.layers}",
        f"model.hidden_size={args.width}",
        f"train.batch_size={args.rows}",
        f"train.micro_batch_size={args.rows}",
        f"train.steps={FIRST + PERIOD * args.windows}",
        "checkpoint.every=null",
        "checkpoint.steps=[]",
    ]


def steps_in_and_out(words: list[str], windows: int) -> tuple[list[float], list[float]]:
    """Seconds of the second step of each window, and of the second one behind it."""
    starts = [FIRST + PERIOD * n for n in range(windows)]
    spans = json.dumps([[start, start + 1] for start in starts])
    times = StepSeconds()
    Trainer(load_config([*words, f"profile.steps={spans}"]), hooks=[times, Profile()]).fit()
    inside = [times.seconds[start + 1] for start in starts]
    outside = [times.seconds[start + 3] for start in starts]
    return inside, outside


def parts_of_a_step(words: list[str]) -> int:
    """How often a step enters a part while nobody records: marks of modules are not there then."""
    count = 0

    def counted(name: str) -> Any:
        nonlocal count
        count += 1
        return nullcontext()

    steps = 3
    trainer = Trainer(load_config([*words, f"train.steps={steps}"]))
    listen(counted)
    try:
        trainer.fit()
    finally:
        unlisten(counted)
    return count // steps


def seconds_of_a_part() -> float:
    """Seconds to enter and leave a part without a listener."""
    began = time.perf_counter()
    for _ in range(CALLS):
        with part("forward"):
            pass
    return (time.perf_counter() - began) / CALLS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="two windows of a tiny model")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.width, args.rows, args.length, args.windows = 2, 64, 2, 64, 2
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "inside_over_outside": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        words = words_of(args, Path(folder))
        outsides = []
        for way, overrides in WAYS.items():
            inside, outside = steps_in_and_out([*words, *overrides], args.windows)
            found["inside_over_outside"][way] = statistics.median(inside) / statistics.median(
                outside
            )
            outsides += outside
        step = statistics.median(outsides)
        count = parts_of_a_step(words)
    found["step_seconds"] = step
    found["parts_of_a_step"] = count
    found["seconds_of_a_part"] = seconds_of_a_part()
    found["off_share"] = count * found["seconds_of_a_part"] / step
    report(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    machine = f"{found['instructions']}, {found['threads']} threads"
    print(f"step {found['step_seconds'] * 1e3:.1f} ms on a CPU with {machine}")
    for way, ratio in found["inside_over_outside"].items():
        print(f"  {way:<22} {ratio - 1:+8.1%} of a step inside a window")
    each = found["seconds_of_a_part"] * 1e9
    print(
        f"  {'off':<22} {found['off_share']:+8.4%}: {found['parts_of_a_step']} parts,"
        f" {each:.0f} ns each"
    )


if __name__ == "__main__":
    main()
