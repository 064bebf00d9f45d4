"""Run a script on several ranks and collect what each of them reports."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from castalia.distributed.join import leave

ROOT = Path(__file__).resolve().parents[2]


def on_ranks(script: str, count: int, *arguments: object) -> list[dict[str, Any]]:
    """Run tests/seams/SCRIPT under torchrun; returns what each rank passed to `report`, in rank
    order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(Path(__file__).with_name(script))]
    command += [str(argument) for argument in arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        # The ranks of a test share two cores: more threads than one each only wait for one another.
        given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "REPORTS": folder}
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | given, timeout=280
        )
        assert done.returncode == 0, f"{script}:\n{done.stdout}\n{done.stderr}"
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(count)]


def report(result: dict[str, Any]) -> None:
    """Hand this rank's result to the test that started it, and leave the others."""
    (Path(os.environ["REPORTS"]) / os.environ["RANK"]).write_text(json.dumps(result))
    leave()
