"""Layouts of the command, against one process: losses, gradient norms, rows and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import castalia
from castalia.checkpoint import read
from castalia.data import IndexedDatasetWriter

BASE = (
    "train",
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=12",
    "train.steps=3",
    "checkpoint.steps=[0]",
    "checkpoint.every=null",
)
LAYOUTS = {
    "three uneven shards": (3, ()),
    "tensor and context": (
        4,
        (
            "parallel.tp=2",
            "parallel.cp=2",
            "optim.eps=1e-6",
            "data.eod_mask_loss=true",
            "data.split='80,20,0'",
            "train.eval_every=1",
        ),
    ),
}
"""Through the command; the grid has all the others, without."""
LAUNCHED = "three uneven shards"
"""The layout that the real launcher starts; the others are forks of one process."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Documents that end in the end-of-document id at irregular places."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for size in random.integers(3, 60, 200):
            writer.add([*random.integers(97, 123, size), 256])
    return prefix


def launch(words: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    """`castalia WORDS` under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--nproc-per-node={ranks}", "-m", "castalia", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def lines_of(done: subprocess.CompletedProcess[str], output: Path) -> list[dict]:
    """The lines of metrics.jsonl of a run that ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tokens, training_shell, tmp_path_factory):
    """Callable: lines and folder of the one-process run with overrides that change numbers."""
    known = {}

    def get(overrides: tuple[str, ...]):
        key = tuple(text for text in overrides if not text.startswith(("parallel.", "train.micro")))
        if key not in known:
            output = tmp_path_factory.mktemp("alone") / "run"
            done = training_shell.castalia(
                [*BASE, f"data.train={tokens}", f"output={output}", *key]
            )
            known[key] = (lines_of(done, output), output)
        return known[key]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(tokens, training_shell, alone, tmp_path, name):
    ranks, overrides = LAYOUTS[name]
    words = [*BASE, f"data.train={tokens}", f"output={tmp_path / 'run'}", *overrides]
    done = launch(words, ranks) if name == LAUNCHED else training_shell.castalia(words, ranks)
    ours = lines_of(done, tmp_path / "run")
    theirs, folder = alone(overrides)
    assert [line["rows_hash"] for line in ours] == [line["rows_hash"] for line in theirs]
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    for key in ("loss", "grad_norm", *(key for key in theirs[0] if key == "valid_loss")):
        assert [line[key] for line in ours] == pytest.approx(
            [line[key] for line in theirs], abs=1e-5
        ), key
    at_start = [read(path / "checkpoints" / "step-00000000") for path in (tmp_path / "run", folder)]
    assert all(torch.equal(at_start[0][n], at_start[1][n]) for n in at_start[1]), (
        "start weights depend on the layout"
    )
    at_end = [read(path / "checkpoints" / "step-00000003") for path in (tmp_path / "run", folder)]
    for n, tensor in at_end[0].items():
        difference = (tensor - at_end[1][n]).abs()
        # A key bias has a noise gradient, which Adam turns into a step of size lr.
        assert (
            difference.view(-1, 3, 8)[:, [0, 2]] if n.endswith("qkv.bias") else difference
        ).max() <= 1e-5, n
    # The config beside the checkpoint asks for several processes; loading does not.
    ours, theirs = (
        castalia.load(str(path)).logits([97, 98, 99]) for path in (tmp_path / "run", folder)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_masked_labels_are_fewer_and_validation_is_there(alone):
    _, overrides = LAYOUTS["tensor and context"]
    lines, _ = alone(overrides)
    assert lines[-1]["tokens"] < 3 * 12 * 16
    assert all(line["valid_loss"] > 0 for line in lines)


def test_a_batch_that_does_not_divide_is_refused(tokens, training_shell, tmp_path):
    words = [*BASE, f"data.train={tokens}", f"output={tmp_path / 'run'}", "train.batch_size=11"]
    done = training_shell.castalia(words, 2)
    assert done.returncode != 0
    assert "castalia: error: " in done.stderr and "11" in done.stderr and "2" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


NAN_ON_RANK_1 = """
import math, os
from dataclasses import replace
import castalia.losses as loss
call = loss.NextToken.__call__
def poisoned(self, scored, batch):
    out = call(self, scored, batch)
    bad = int(os.environ["RANK"]) == 1 and int(batch.index[0]) >= 12
    return replace(out, total=out.total * (math.nan if bad else 1.0))
loss.NextToken.__call__ = poisoned
"""


def test_nan_on_one_process_stops_all_before_the_update(tokens, training_shell, tmp_path):
    output = tmp_path / "run"
    words = [*BASE, f"data.train={tokens}", f"output={output}"]
    done = training_shell.castalia(words, 2, NAN_ON_RANK_1)
    assert done.returncode != 0
    sentence = "castalia: error: loss nan at step 2 (rows 12 to 23"
    assert done.stderr.count(sentence) == 2, done.stderr
    assert "the last good checkpoint is step 0" in done.stderr
    assert [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ] == [1]
