"""The same rows and weights on any number of workers and ranks, also through a kill."""

import json
import re
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from castalia.data import IndexedDatasetWriter, StepLoader, build_rows
from castalia.mixing import read_mixture
from castalia.recipes import load_config
from castalia.train.mixture import make_mixture
from castalia.train.totals import StepTotals

STEPS = 200
BATCH = 8
KILL_AT_100 = """
import os, signal
import castalia.train.hooks as hooks
def after_step(self, step, save=hooks.Save.after_step):
    save(self, step)
    if step.number == 104:
        self.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
hooks.Save.after_step = after_step
"""


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Three sources of 20 to 90 rows of 16 tokens and very different entropy."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(3)
    for name, rows, letters in (("wide", 90, 128), ("narrow", 40, 8), ("flat", 20, 1)):
        with IndexedDatasetWriter(folder / name, "uint16") as writer:
            for _ in range(rows):
                writer.add(random.integers(0, letters, 16))
    return [str(folder / name) for name in ("wide", "narrow", "flat")]


def walk(prefixes: list[str], *, world: int, workers: int, lag: int = 1) -> Iterator[tuple]:
    """Ids and weights of each step, when losses follow from the rows; each rank has a planner."""
    overrides = [
        "mixing.kind=odm",
        f"mixing.lag={lag}",
        "mixing.eps=0.02",
        f"train.steps={STEPS}",
        "data.seq_length=16",
    ]
    config = load_config(
        ["debug", f"data.train=[{', '.join(prefixes)}]", f"train.batch_size={BATCH}", *overrides]
    )
    numbers = {
        "seed": 1,
        "batch_size": BATCH,
        "steps": STEPS,
        "eval_every": None,
        "eval_batches": 1,
    }
    rows = build_rows(config.data, **numbers, planned=True)
    mixtures = [make_mixture(config, rows) for _ in range(world)]
    loaders = [
        iter(StepLoader(rows.train, batch_size=BATCH, micro_batch_size=1, dp_rank=rank,
                        dp_world=world, workers=workers,
                        plans=mixture))
        for rank, mixture in enumerate(mixtures)
    ]  # fmt: skip
    for _ in range(STEPS):
        parts = [next(loader) for loader in loaders]
        batches = [
            parts[rank][g] for g in range(len(parts[0])) for rank in range(world)
        ]  # the order of the plan
        sums = np.zeros((3, 2))
        for batch in batches:
            sums[int(batch.source)] += (float(batch.tokens.double().std()) / 10 * 16, 16)
        totals = StepTotals(0.0, BATCH * 16, per_source=sums.tolist())
        for mixture in mixtures:
            mixture.observe(totals)
        yield [batch.tokens.tolist() for batch in batches], mixtures[-1].plan.weights.tolist()
    for loader in loaders:
        assert next(loader, None) is None  # and no step more
        loader.close()


@pytest.fixture(scope="module")
def alone(prefixes) -> list[tuple]:
    """One process, no workers."""
    return list(walk(prefixes, world=1, workers=0))


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (1, 8), (2, 2), (4, 8)])
def test_200_steps_on_any_number_of_processes_and_workers(prefixes, alone, world, workers):
    assert list(walk(prefixes, world=world, workers=workers)) == alone
    assert len({str(weights) for _, weights in alone}) > 100  # the weights do move


def test_the_lag_is_part_of_the_run(prefixes, alone):
    assert [w for _, w in walk(prefixes, world=1, workers=0, lag=2)] != [w for _, w in alone]


OVERRIDES = (
    "mixing.kind=odm",
    "mixing.warmup_steps=5",
    "model.num_layers=1",
    f"train.steps={STEPS}",
    "checkpoint.every=100",
    "train.log_every=200",
)


@pytest.fixture(scope="module")
def whole(train, prefixes, tmp_path_factory):
    """200 steps on one process without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output, f"data.train=[{', '.join(prefixes)}]", *OVERRIDES)
    return output


@pytest.mark.parametrize(
    ("first", "second"),
    [(2, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 2), (2, 4)))],
)
def test_killed_after_100_of_200_steps_and_resumed_on_others(
    train, prefixes, whole, tmp_path, first, second
):
    output = tmp_path / "run"
    data = f"data.train=[{', '.join(prefixes)}]"
    killed = train(output, data, *OVERRIDES, processes=first, code=KILL_AT_100, ok=False)
    assert killed.returncode in (-signal.SIGKILL, 1)
    assert "resumed from" in train(output, data, *OVERRIDES, processes=second).stdout
    ours = read_mixture(output / "mixture.jsonl")
    theirs = read_mixture(whole / "mixture.jsonl")
    assert ours.steps == theirs.steps == list(range(1, STEPS + 1))
    assert ours.weights().tobytes() == theirs.weights().tobytes()
    for step in ours.steps:
        assert ours.lines[step]["counts"].tolist() == theirs.lines[step]["counts"].tolist()
        assert ours.lines[step]["read"].tolist() == theirs.lines[step]["read"].tolist()
    hashes = [
        [json.loads(line)["rows_hash"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (output, whole)
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp", "cp"])
def test_a_model_in_parts_mixes_like_one_process(train, prefixes, tmp_path, axis):
    data = (
        f"data.train=[{', '.join(prefixes)}]",
        *OVERRIDES,
        "train.steps=20",
        "train.micro_batch_size=6",
    )
    data = (*data, "model.num_layers=2", "checkpoint.every=null")
    train(tmp_path / "one", *data)
    train(tmp_path / "parts", *data, f"parallel.{axis}=2", processes=2)
    one, parts = (read_mixture(tmp_path / name / "mixture.jsonl") for name in ("one", "parts"))
    assert one.weights().tobytes() == parts.weights().tobytes() and one.steps == parts.steps
    assert [line["loss"] for line in one.lines.values()] == [
        line["loss"] for line in parts.lines.values()
    ]


@pytest.mark.slow
def test_processes_that_plan_different_rows_are_found(train, prefixes, tmp_path):
    drift = """
import castalia.train.mixture as mixing
from castalia.core.ranks import environment
def observe(self, totals, skipped=False, real=mixing.PlannedMixture.observe):
    if self.done == 2 and environment()[0] == 1:
        loss, tokens = totals.per_source[0]
        totals.per_source[0] = [2 * loss, tokens]
    real(self, totals, skipped=skipped)
mixing.PlannedMixture.observe = observe
"""
    data = (
        f"data.train=[{', '.join(prefixes)}]",
        *OVERRIDES,
        "train.steps=20",
        "mixing.warmup_steps=0",
        "mixing.eps=0",
    )
    done = train(tmp_path / "run", *data, processes=2, code=drift, ok=False)
    assert done.returncode != 0
    assert re.search(r"castalia: error: step \d+: the planners disagree across ranks", done.stderr)
