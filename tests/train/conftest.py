"""A token file, and ways to run a training in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    """Runs `castalia train debug ...` small, in subprocesses."""

    def __init__(self, tokens: Path) -> None:
        self.base = ("debug", f"data.train={tokens}", *SMALL)

    def __call__(
        self, output: Path, *overrides: str, processes: int = 1, code: str = "", ok: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Train in `output`; `code` runs before the command, in each process."""
        arguments = ["train", *self.base, f"output={output}", *overrides]
        lines = [
            f"import sys; sys.argv = ['castalia', *{arguments!r}]",
            code,
            "from castalia.cli import main; main()",
        ]
        path = output.parent / f"{output.name}.{processes}.py"
        path.write_text("\n".join(lines))
        command = [sys.executable, str(path)]
        if processes > 1:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--local-addr=127.0.0.1",
            ]
            command += ["--nproc-per-node", str(processes), str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        if ok:
            assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="session")
def train(tokens) -> Runs:
    """Callable that trains."""
    return Runs(tokens)


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def read_lines():
    """Callable that reads metrics.jsonl."""
    return metrics
