"""Cost of mixing per step: observe + weights + plan for 1 to 10,000 sources, and in training runs.

    python benchmarks/mixing_cost.py [--steps N] [--run-steps N] [--long-steps N] [--json FILE]

A step plans 1,024 rows with lag 1, observes a loss of every source and reads the weights. Numbers
are microseconds: median and 99th percentile of the steps after the first tenth. dbl and
naive-validation get an evaluation at every step, which no run does. `rows` is the additional cost
of resolving all 1,024 rows; a rank needs only its own part. The benchmark fails if a mixer exceeds
CEILING at 1,000 sources.

The runs use `castalia train`'s loop over two sources: a decoder of about 1M parameters, and one
with the shape and vocabulary of pythia-14m, both with 2,048 tokens a step. The share covers
planning, resolving rows and observing; writing mixture.jsonl is reported separately. The ratio
compares the small run with a replay of its own record, which has the same rows and shapes but no
mixer that learns. Both trainers step in turn, A B B A; a ratio is that of one block. Takes five
minutes on two idle cores.
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
from castalia.distributed import World
from castalia.mixing import MIXERS, Planner, Stats, make_mixer
from castalia.recipes import load_config
from castalia.runs.hook import start_hook
from castalia.runs.named_corpus import ensure_corpus
from castalia.train.hooks import RecordMixture, Step
from castalia.train.trainer import Trainer

COUNTS = (1, 10, 22, 100, 1000, 10_000)
ROWS = 1024
"""Rows in a step."""
CEILING = 250.0
"""Largest allowed median at 1,000 sources in microseconds, five times the budget of 50."""
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure, print a table, write JSON."""
    options = read_options()
    names = sorted(set(MIXERS) - {"replay"})
    times = {name: [measure(name, count, options.steps) for count in COUNTS] for name in names}
    print(f"observe + weights + plan, median / 99th percentile in us\n{'sources':<18}", end="")
    print("".join(f"{count:>16,}" for count in COUNTS))
    for name, cases in times.items():
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
        f"step with a mixer / step of a replay: {ratio['ratio']:.4f}"
        f" ({ratio['low']:.4f} to {ratio['high']:.4f} in half of {ratio['blocks']} blocks;"
        f" standard error {ratio['error']:.4f})"
    )
    result = {
        "machine": describe(),
        "rows": ROWS,
        "steps": options.steps,
        "microseconds": times,
        "runs": runs,
    }
    write_json(options.json, result | {"against_a_replay": ratio})
    check_ceiling(times)


def check_ceiling(times: dict[str, list[dict[str, Any]]]) -> None:
    """Fail if a mixer is too slow at 1,000 sources."""
    place = COUNTS.index(1000)
    slowest = max(times, key=lambda name: times[name][place]["all"])
    microseconds = times[slowest][place]["all"]
    print(f"slowest at 1,000 sources: {slowest}, {microseconds:.0f} us (ceiling {CEILING:.0f} us)")
    if microseconds > CEILING:
        raise SystemExit(f"{slowest} takes {microseconds:.0f} us a step at 1,000 sources")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of a mixing step.")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each case of the table")
    parser.add_argument("--run-steps", type=int, default=300, help="steps of the small model")
    parser.add_argument("--long-steps", type=int, default=25, help="steps of the larger model")
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
    """Microseconds of one case, without the first tenth of the steps."""
    planner = build(name, count)
    random = np.random.default_rng(0)
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
SKIPPED = 5
"""Steps or blocks at the start that do not count, while caches fill."""


def alone(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """Microseconds per step that a run spends on mixing, and their share of the step."""
    with tempfile.TemporaryDirectory() as folder, Timers() as timers:
        trainer = trainer_of(folder, steps, *overrides, "mixing.kind=odm")
        record = RecordMixture()
        times: list[int] = []
        spent: list[list[int]] = []
        start_hook(record, trainer.services())
        for step, nanoseconds in walk(trainer, steps):
            start = time.perf_counter_ns()
            record.after_step(step)
            times.append(nanoseconds)
            spent.append([*timers.take(), time.perf_counter_ns() - start])
    own = np.array(spent[SKIPPED:]) / 1e3
    whole = np.array(times[SKIPPED:]) / 1e3
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
    """Time of two steps with a mixer over that of the same two steps of a replay, by block."""
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
            assert hashes[0] == hashes[1], "the replay reads different rows"
    mixed, replayed = (np.array(t).reshape(-1, 2).sum(axis=1)[SKIPPED:] for t in times)
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
    """Take the steps one by one; yield each with its nanoseconds, data loading included."""
    batches = trainer.training_batches()
    for _ in range(steps):
        start = time.perf_counter_ns()
        step = trainer.take_step(next(batches))
        assert step is not None
        yield step, time.perf_counter_ns() - start


class Timers:
    """Context that sums the nanoseconds of calls into the mixture, by part."""

    def __enter__(self) -> "Timers":
        self.spent = dict.fromkeys(PARTS, 0)
        mixture = mixing.PlannedMixture
        self.real = {name: getattr(mixture, name) for name in ("plan_ahead", "observe")}
        located = mixing.located
        self.located = located
        mixing.located = lambda plan: self.timed("rows", located(plan))
        # On the class, because the trainer makes the instance.
        setattr(mixture, "plan_ahead", self.timed("plan", mixture.plan_ahead))  # noqa: B010
        setattr(mixture, "observe", self.timed("observe", mixture.observe))  # noqa: B010
        return self

    def __exit__(self, *error: object) -> None:
        mixing.located = self.located
        for name, method in self.real.items():
            setattr(mixing.PlannedMixture, name, method)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call so that its time is added to `name`."""

        def inner(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter_ns()
            result = call(*arguments, **options)
            self.spent[name] += time.perf_counter_ns() - start
            return result

        return inner

    def take(self) -> list[int]:
        """Nanoseconds by part since the last call."""
        out = list(self.spent.values())
        self.spent = dict.fromkeys(PARTS, 0)
        return out


if __name__ == "__main__":
    main()
