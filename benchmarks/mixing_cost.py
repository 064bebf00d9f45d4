"""What mixing costs a step: plan + observe for 1 to 10,000 sources, and for every mixer at 1,000.

    python benchmarks/mixing_cost.py [--steps N] [--json FILE]

A step plans 1,024 rows with lag 1 and observes a loss of every source, so that `weights()` is computed anew each time.
`rows` is what resolving all 1,024 rows to row numbers costs on top; a process needs its own part of them alone.
Microseconds, median and 99th percentile; the step of a small model on a CPU takes 10,000 and more.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from castalia.mixing import MIXERS, Planner, Stats, make_mixer

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
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    machine["load_at_end"] = round(os.getloadavg()[0], 2)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "rows": ROWS, "steps": options.steps, "microseconds": found}, indent=1)
    options.json.write_text(text + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of a mixing step.")
    parser.add_argument("--steps", type=int, default=3000)
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


if __name__ == "__main__":
    main()
