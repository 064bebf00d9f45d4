"""What mixing costs a step: plan + observe for 1 to 10,000 sources, every mixer at 1,000, and in a real run.

    python benchmarks/mixing_cost.py [--steps N] [--run-steps N] [--json FILE]

A step plans 1,024 rows with lag 1 and observes a loss of every source, so that `weights()` is computed anew each time.
`rows` is what resolving all 1,024 rows to row numbers costs on top; a process needs its own part of them alone.
Microseconds, median and 99th percentile; the step of a small model on a CPU takes 10,000 and more.

The real run is a small model over two sources under `castalia train`'s loop. Its share of step time is what planning,
resolving the rows and observing take of each step. The ratio compares it with a replay of its own record: the same rows
and shapes, without a mixer that learns. Both trainers take their steps in turn, A B B A; a ratio is that of one block.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import castalia.train.mixture as mixing
from castalia.distributed import World
from castalia.mixing import MIXERS, Planner, Stats, make_mixer
from castalia.recipes import load_config
from castalia.recipes.corpus import ensure_corpus
from castalia.train.mixture_record import RecordMixture
from castalia.train.trainer import Trainer

COUNTS = (1, 10, 22, 100, 1000, 10_000)
ROWS = 1024
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure, print a table, write JSON."""
    options = read_options()
    found = [measure("odm", count, options.steps) for count in COUNTS]
    found += [measure(name, 1000, options.steps) for name in sorted(set(MIXERS) - {"odm", "replay"})]
    print(f"{'mixer':<18}{'sources':>9}{'plan':>9}{'observe':>9}{'both':>9}{'p99':>9}{'rows':>9}")
    for case in found:
        numbers = "".join(f"{case[name]:>9.1f}" for name in ("plan", "observe", "both", "p99", "rows"))
        print(f"{case['mixer']:<18}{case['sources']:>9,}{numbers}")
    run = in_a_run(options.run_steps)
    print(
        f"in a run of {run['steps']} steps of {run['step_ms']:.1f} ms: {run['microseconds']:.0f} us a step are the"
        f" mixture's, {run['share']:.4%}; with a mixer / with a replay {run['ratio']:.4f}"
        f" ({run['low']:.4f} to {run['high']:.4f})"
    )
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    machine["load_at_end"] = round(os.getloadavg()[0], 2)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "rows": ROWS, "steps": options.steps, "microseconds": found, "run": run}
    text = json.dumps(result, indent=1)
    options.json.write_text(text + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of a mixing step.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--run-steps", type=int, default=400)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "mixing_cost.json")
    return parser.parse_args()


def build(name: str, count: int) -> Planner:
    """A planner over `count` sources, with the mixer's defaults."""
    sources = [f"source-{i}" for i in range(count)]
    sizes = np.arange(1, count + 1) * 1000
    needed: dict[str, dict[str, Any]] = {
        "unimax": {"budget": 1000.0 * count},
        "dbl": {"target": np.full(count, 2.0)},
        "doremi": {"reference": np.full(count, 2.0)},
    }
    mixer = make_mixer(name, sources=sources, sizes=sizes, warmup_steps=10, **needed.get(name, {}))
    return Planner(mixer, sizes=sizes, rows=ROWS, seed=1, lag=1)


def measure(name: str, count: int, steps: int) -> dict[str, Any]:
    """Microseconds of one case; the first tenth of the steps is not counted."""
    planner, random = build(name, count), np.random.default_rng(0)
    tokens = np.full(count, 2048.0)
    losses = [random.uniform(2, 4, count) for _ in range(64)]
    spent = np.zeros((steps, 3))
    for step in range(1, steps + 1):
        means = losses[step % 64]
        stats = Stats(step, means * tokens, tokens, val_loss=means if name in ("dbl", "naive-validation") else None)
        start = time.perf_counter_ns()
        plan = planner.plan(step)
        planned = time.perf_counter_ns()
        planner.observe(stats)
        observed = time.perf_counter_ns()
        if step % 10 == 0:
            plan.rows()
        spent[step - 1] = planned - start, observed - planned, time.perf_counter_ns() - observed
    counted = spent[steps // 10 :] / 1000
    both = counted[:, :2].sum(axis=1)
    rows = spent[9::10, 2][steps // 100 :] / 1000
    return {
        "mixer": name,
        "sources": count,
        "plan": round(float(np.median(counted[:, 0])), 1),
        "observe": round(float(np.median(counted[:, 1])), 1),
        "both": round(float(np.median(both)), 1),
        "p99": round(float(np.percentile(both, 99)), 1),
        "rows": round(float(np.median(rows)), 1),
    }


RUN = (
    "debug",
    "model.num_layers=4",
    "model.hidden_size=128",
    "data.seq_length=128",
    "train.batch_size=16",
    "checkpoint.every=null",
    "checkpoint.steps=[]",
)


def in_a_run(steps: int) -> dict[str, Any]:
    """The mixture's share of a real step, and the time of a step with a mixer over that with a replay."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = trainer_of(folder, steps, "mixing.kind=odm", "mixing.warmup_steps=10")
        recorded.hooks.append(RecordMixture())
        recorded.fit()
        record = f"mixing.record={folder}/mixture.jsonl"
        spent: list[int] = []
        arms = [
            walk(trainer_of(folder, steps, "mixing.kind=odm", "mixing.warmup_steps=10")),
            walk(trainer_of(folder, steps, "mixing.kind=replay", record)),
        ]
        with_timers(spent)
        own, times = [], ([], [])
        for _ in range(steps // 2):
            for arm in (0, 1, 1, 0):
                spent.clear()
                times[arm].append(next(arms[arm]))
                if arm == 0:
                    own.append(sum(spent))
    mixed, replayed = (np.array(t).reshape(-1, 2).sum(axis=1)[BLOCKS_LEFT_OUT:] for t in times)
    ratios, share = mixed / replayed, np.array(own[2 * BLOCKS_LEFT_OUT :]) / np.array(times[0][2 * BLOCKS_LEFT_OUT :])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {
        "steps": steps,
        "step_ms": round(float(np.median(mixed)) / 2e6, 2),
        "microseconds": round(float(np.median(own)) / 1e3, 1),
        "share": float(np.median(share)),
        "ratio": round(float(middle), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


BLOCKS_LEFT_OUT = 5
"""At the start, while caches fill."""


def trainer_of(folder: str, steps: int, *overrides: str) -> Trainer:
    """A trainer without hooks, on the corpus that `folder` holds."""
    config = load_config([*RUN, f"output={folder}", f"train.steps={steps}", *overrides])
    return Trainer(ensure_corpus(config, say=lambda line: None), World(0, 1, torch.device("cpu")))


def walk(trainer: Trainer) -> Iterator[int]:
    """Take a step each time; nanoseconds of it, its data included."""
    batches = trainer.batches(trainer.rows.train, 0, trainer.mixture)
    while True:
        start = time.perf_counter_ns()
        trainer.take_step(next(batches))
        yield time.perf_counter_ns() - start


def with_timers(spent: list[int]) -> None:
    """From now on the calls into the mixture append their nanoseconds to `spent`."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*given: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            found = call(*given, **named)
            spent.append(time.perf_counter_ns() - start)
            return found

        return inner

    located = mixing.located
    mixing.located = lambda plan: timed(located(plan))
    mixing.Mixture.plan_ahead = timed(mixing.Mixture.plan_ahead)  # type: ignore[method-assign]
    mixing.Mixture.observe = timed(mixing.Mixture.observe)  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
