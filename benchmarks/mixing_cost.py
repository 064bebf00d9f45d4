"""What mixing costs a step: observe + weights + plan for 1 to 10,000 sources and every mixer, and in real runs.

    python benchmarks/mixing_cost.py [--steps N] [--run-steps N] [--long-steps N] [--json FILE]

A step plans 1,024 rows with lag 1, observes a loss of every source and asks for the weights. Microseconds, median and
99th percentile of the steps after the first tenth; dbl and naive-validation get an evaluation in every step, which no
run does. `rows` is what resolving all 1,024 rows to row numbers costs on top; a process needs its own part alone.

The runs are those of `castalia train`'s loop over two sources: a decoder of about 1M parameters, and one of the shape
and vocabulary of pythia-14m, both with 2,048 tokens a step. Their share of step time is what planning, resolving the
rows and observing take of each step; what writing mixture.jsonl takes comes on top and stands apart. The ratio compares
the small run with a replay of its own record: the same rows and shapes without a mixer that learns. Both trainers take
their steps in turn, A B B A; a ratio is that of one block. Five minutes on two idle cores.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

import castalia.train.mixture as mixing
from castalia.core.files import write_json
from castalia.demo.corpus import ensure_corpus
from castalia.distributed import World
from castalia.mixing import MIXERS, Planner, Stats, make_mixer
from castalia.recipes import load_config
from castalia.train.hooks import RecordMixture, Step
from castalia.train.hooks.hook import start_hook
from castalia.train.trainer import Trainer

COUNTS = (1, 10, 22, 100, 1000, 10_000)
ROWS = 1024
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure, print a table, write JSON."""
    options = read_options()
    names = sorted(set(MIXERS) - {"replay"})
    found = {name: [measure(name, count, options.steps) for count in COUNTS] for name in names}
    print(f"observe + weights + plan, median / 99th percentile in us\n{'sources':<18}", end="")
    print("".join(f"{count:>16,}" for count in COUNTS))
    for name, cases in found.items():
        print(
            f"{name:<18}" + "".join(f"{case['all']:>8.0f} /{case['p99']:>6.0f}" for case in cases)
        )
    runs = {"1M": alone(RUN, options.run_steps), "14M": alone(RUN + LARGER, options.long_steps)}
    for size, run in runs.items():
        parts = ", ".join(f"{name} {run[name]:.0f}" for name in PARTS)
        print(
            f"{size} parameters, {run['steps']} steps of {run['step_ms']:.1f} ms: mixing takes"
            f" {run['microseconds']:.0f} us a step ({parts}), {run['share']:.4%} of it;"
            f" its record {run['record']:.0f} us more"
        )
    ratio = against_a_replay(options.run_steps)
    print(
        f"step with a mixer / step of a replay: {ratio['ratio']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f} in half"
        f" of {ratio['blocks']} blocks; its own error {ratio['error']:.4f})"
    )
    result = {
        "machine": describe(),
        "rows": ROWS,
        "steps": options.steps,
        "microseconds": found,
        "runs": runs,
    }
    write_json(options.json, result | {"against_a_replay": ratio})


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of a mixing step.")
    parser.add_argument("--steps", type=int, default=2000, help="of each case of the table")
    parser.add_argument("--run-steps", type=int, default=300, help="of the small model")
    parser.add_argument("--long-steps", type=int, default=25, help="of the larger model")
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
        stats = Stats(
            step,
            means * tokens,
            tokens,
            val_loss=means if name in ("dbl", "naive-validation") else None,
        )
        start = time.perf_counter_ns()
        plan = planner.plan(step)
        planned = time.perf_counter_ns()
        planner.observe(stats)
        planner.mixer.weights()
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
        "all": round(float(np.median(both)), 1),
        "p99": round(float(np.percentile(both, 99)), 1),
        "mean": round(float(both.mean()), 1),
        "rows": round(float(np.median(rows)), 1),
    }


RUN = (
    "debug",
    "data.seq_length=128",
    "train.batch_size=16",
    "checkpoint.every=null",
    "checkpoint.steps=[]",
    "mixing.warmup_steps=5",
)
LARGER = ("model.num_layers=6", "model.vocab_size=50304", "train.micro_batch_size=4")
PARTS = ("plan", "rows", "observe")
LEFT_OUT = 5
"""Steps, or blocks, at the start, while caches fill."""


def alone(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """Microseconds of a step of a run that go to mixing, and their share."""
    with tempfile.TemporaryDirectory() as folder, Timers() as timers:
        trainer = trainer_of(folder, steps, *overrides, "mixing.kind=odm")
        record, times, spent = RecordMixture(), [], []
        start_hook(record, trainer.services())
        for step, nanoseconds in walk(trainer, steps):
            start = time.perf_counter_ns()
            record.after_step(step)
            times.append(nanoseconds)
            spent.append([*timers.take(), time.perf_counter_ns() - start])
    own, whole = np.array(spent[LEFT_OUT:]) / 1e3, np.array(times[LEFT_OUT:]) / 1e3
    mixing = own[:, : len(PARTS)].sum(axis=1)
    out = {
        "steps": steps,
        "step_ms": float(np.median(whole)) / 1e3,
        "microseconds": float(np.median(mixing)),
    }
    out |= {
        name: float(np.median(column))
        for name, column in zip([*PARTS, "record"], own.T, strict=True)
    }
    return out | {
        "share": float(np.median(mixing / whole)),
        "share_of_all": float(mixing.sum() / whole.sum()),
    }


def against_a_replay(steps: int) -> dict[str, Any]:
    """The time of two steps with a mixer over that of the same two of a replay, block by block."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = trainer_of(folder, steps, *RUN, "mixing.kind=odm")
        recorded.hooks.append(RecordMixture())
        recorded.fit()
        replay = ("mixing.kind=replay", f"mixing.record={folder}/mixture.jsonl")
        trainers = [trainer_of(folder, steps, *RUN, *arm) for arm in (("mixing.kind=odm",), replay)]
        arms = [walk(trainer, steps) for trainer in trainers]
        times = ([], [])
        hashes = [0, 0]
        for _ in range(steps // 2):
            for arm in (0, 1, 1, 0):
                step, nanoseconds = next(arms[arm])
                times[arm].append(nanoseconds)
                hashes[arm] = step.metrics["rows_hash"]
            assert hashes[0] == hashes[1], "the replay reads other rows"
    mixed, replayed = (np.array(t).reshape(-1, 2).sum(axis=1)[LEFT_OUT:] for t in times)
    low, middle, high = (float(value) for value in np.percentile(mixed / replayed, [25, 50, 75]))
    error = 1.25 * float(np.std(mixed / replayed)) / len(mixed) ** 0.5
    return {
        "steps": steps,
        "blocks": len(mixed),
        "ratio": middle,
        "low": low,
        "high": high,
        "error": error,
    }


def trainer_of(folder: str, steps: int, *overrides: str) -> Trainer:
    """A trainer without hooks, on the corpus that `folder` holds."""
    config = load_config([*overrides, f"output={folder}", f"train.steps={steps}"])
    return Trainer(ensure_corpus(config, say=lambda line: None), World(0, 1, torch.device("cpu")))


def walk(trainer: Trainer, steps: int) -> Iterator[tuple[Step, int]]:
    """Take the steps one by one; each, and its nanoseconds, its data included."""
    batches = trainer.training_batches()
    for _ in range(steps):
        start = time.perf_counter_ns()
        step = trainer.take_step(next(batches))
        assert step is not None
        yield step, time.perf_counter_ns() - start


class Timers:
    """While it is entered, the calls into the mixture add up their nanoseconds."""

    def __enter__(self) -> "Timers":
        self.spent = dict.fromkeys(PARTS, 0)
        self.real = mixing.located, mixing.PlannedMixture.plan_ahead, mixing.PlannedMixture.observe
        located, plan_ahead, observe = self.real
        mixing.located = lambda plan: self.timed("rows", located(plan))
        mixing.PlannedMixture.plan_ahead = self.timed("plan", plan_ahead)  # type: ignore[method-assign]
        mixing.PlannedMixture.observe = self.timed("observe", observe)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        mixing.located, mixing.PlannedMixture.plan_ahead, mixing.PlannedMixture.observe = self.real  # type: ignore[method-assign]

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, which adds its time to `name`."""

        def inner(*given: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            found = call(*given, **named)
            self.spent[name] += time.perf_counter_ns() - start
            return found

        return inner

    def take(self) -> list[int]:
        """What was added up since the last call, by part."""
        out = list(self.spent.values())
        self.spent = dict.fromkeys(PARTS, 0)
        return out


if __name__ == "__main__":
    main()
