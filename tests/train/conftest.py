"""A token file, and a way to run a training in processes of its own."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.fixtures.forked_shell import ForkedShell

from castalia.data import IndexedDatasetWriter

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=12",
    "train.steps=6",
    "checkpoint.every=1",
    "checkpoint.steps=[]",
    "train.log_every=1",
)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Prefix of a token file of 40 documents of bytes."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for size in random.integers(20, 300, 40):
            writer.add(random.integers(97, 123, size))
    return prefix


class Runs:
    """Runs `castalia train debug ...` small, in forks of one warm process."""

    def __init__(self, tokens: Path, shell: ForkedShell) -> None:
        self.base = ("debug", f"data.train={tokens}", *SMALL)
        self.shell = shell

    def __call__(
        self, output: Path, *overrides: str, processes: int = 1, code: str = "", ok: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Train in `output`; `code` runs before the command, in each process."""
        words = ["train", *self.base, f"output={output}", *overrides]
        done = self.shell.castalia(words, processes, code)
        if ok:
            assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="session")
def train(tokens, training_shell) -> Runs:
    """Callable that trains."""
    return Runs(tokens, training_shell)


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def read_lines():
    """Callable that reads metrics.jsonl."""
    return metrics
