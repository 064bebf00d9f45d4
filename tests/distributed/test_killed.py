"""Ranks killed at any moment, changing world sizes: no sample lost or repeated, equal weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import read, verify
from castalia.data import IndexedDatasetWriter

KILLING = Path(__file__).with_name("killing.py")
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "rows_hash")
SMALL = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "data.seq_length=16",
    "checkpoint.steps=[]",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "train.log_every=1",
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Documents of bytes."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(3)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for size in random.integers(3, 60, 400):
            writer.add([*random.integers(97, 123, size), 256])
    return prefix


def train(program, tokens, *runs):
    """Run (folder, overrides, attempts) one after another; what happened in each attempt."""
    plans = [
        {
            "output": str(folder),
            "arguments": ["train", "debug", *SMALL, f"data.train={tokens}", *overrides],
            "attempts": [{"processes": processes, "kill": seed} for processes, seed in attempts],
        }
        for folder, overrides, attempts in runs
    ]
    done = program(KILLING, json.dumps(plans), limit=900)
    logs = "".join(f"{folder}:\n{(folder / 'log.txt').read_text()}" for folder, _, _ in runs)
    assert done.returncode == 0, done.stderr + logs
    told = json.loads(done.stdout)
    for attempt in (attempt for run in told for attempt in run):
        # The others exit with a sentence (1), or by torchrun's signals while they waited.
        allowed = {0} if attempt["killed"] is None else {0, 1, -15, -9}
        assert set(attempt["codes"]) <= allowed, (attempt, logs)
    assert "Traceback" not in logs
    return told


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(folder):
    return [[line[key] for key in EXACT] for line in lines(folder)]


def require_whole_folder(folder, last):
    """What is there is whole, and killed saves left nothing."""
    names = sorted(item.name for item in (folder / "checkpoints").iterdir() if item.name != ".lock")
    assert names == [f"step-{step:08d}" for step in (last - 4, last - 2, last)]
    assert verify(folder / "checkpoints" / names[-1]) == []


def kill_and_compare(program, tokens, tmp_path, kills, steps):
    """Compare a run with kills and one without: metrics and final weights, bit for bit."""
    attempts = [(2, 100 + seed) for seed in range(kills)] + [(2, None)]
    overrides = (f"train.steps={steps}",)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, told = train(program, tokens, (whole, overrides, [(2, None)]), (killed, overrides, attempts))
    assert len([attempt for attempt in told if attempt["killed"] is not None]) == kills
    assert [line["step"] for line in lines(killed)] == list(range(1, steps + 1))
    assert exact(killed) == exact(whole)
    ours, theirs = (
        read(path / "checkpoints" / f"step-{steps:08d}", prefix="") for path in (killed, whole)
    )
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    require_whole_folder(killed, steps)
    return told


@pytest.mark.slow
def test_four_kills_at_random_moments_change_nothing(program, tokens, tmp_path):
    kill_and_compare(program, tokens, tmp_path, 4, 20)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(program, tokens, tmp_path):
    told = kill_and_compare(program, tokens, tmp_path, 20, 100)[:-1]
    assert {attempt["killed"] for attempt in told} == {0, 1}
    torn = [bool(attempt["torn"]) for attempt in told]
    assert any(torn) and not all(torn), "kills during saves, and kills between them"


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        # Other sizes with equal shares are resumed in train/test_resume.py too.
        pytest.param((), (4, 3, 2, 4), marks=pytest.mark.slow),
        # Two rows a rank: 8 and 4 of the 12 on four ranks; 10 and 2 on five, three with padding.
        (("train.micro_batch_size=2", "parallel.uneven=true"), (4, 5, 2, 3)),
    ],
)
def test_a_world_that_shrinks_and_grows_keeps_the_batch_and_the_samples(
    program, tokens, tmp_path, overrides, sizes
):
    """Each world but the last is killed at some moment; against one process."""
    overrides = ("train.steps=16", *overrides)
    sizes = [(size, seed if seed < len(sizes) else None) for seed, size in enumerate(sizes, 1)]
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    train(program, tokens, (alone, overrides, [(1, None)]), (moved, overrides, sizes))
    ours, theirs = lines(moved), lines(alone)
    for key in ("step", "tokens", "rows_hash", "lr"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx(
            [line[key] for line in theirs], abs=1e-5
        ), key
    require_whole_folder(moved, 16)


def test_torchrun_restarts_a_run_that_went_back_and_then_lost_a_rank(
    tokens, training_shell, tmp_path
):
    """One NaN loss on rank 1 alone: both roll back and skip the step, also after a restart."""
    output, alone = tmp_path / "run", tmp_path / "alone"
    arguments = ["debug", *SMALL, f"data.train={tokens}", "train.steps=8"]
    program = str(Path(__file__).with_name("restarted.py"))
    words = [program, *arguments, "guard.nan=rollback", f"output={output}"]
    done = training_shell.file(words, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "loss nan at step 3 (rows 24 to 35 of the data order);"
        " rolling back to step 2; skipped: step 3" in done.stderr
    )
    assert done.stdout.count("rolled back to") == 1 and done.stdout.count("resumed from") == 1
    words = ["train", *arguments, "guard.skip_steps=[3]", f"output={alone}"]
    done = training_shell.castalia(words)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = lines(output), lines(alone)
    skipped = [line["step"] for line in ours if line.get("skipped") == "nan"]
    assert skipped == [3] and len(ours) == 8
    for key in ("step", "tokens", "rows_hash"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key
    losses = [[line["loss"] for line in each if line["step"] != 3] for each in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
