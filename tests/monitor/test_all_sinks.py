"""Every sink read back by its own library, after one run that was killed and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from castalia.monitor.sinks.sink import flatten_metrics

SCRIPT = Path(__file__).with_name("all_sinks.py")
UNSHOWN = ("step", "rows_hash")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the readers found."""
    folder = tmp_path_factory.mktemp("sinks")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "COMET", "MLFLOW", "TRACKIO", "HF_"))
    }
    environment |= {"TRACKIO_DIR": str(folder / "trackio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(folder / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not delivered" not in done.stderr and "goes on without" not in done.stderr, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("sink", ["tensorboard", "wandb", "comet", "mlflow", "trackio"])
def test_every_number_stands_once_under_its_step(found, sink):
    records = [flatten_metrics(record) for record in found["metrics"]]
    assert [record["step"] for record in records] == list(range(1, 13))
    curves = found[sink]["curves"]
    if sink == "trackio":
        curves["time"] = curves.pop("wall_time")
    # What Comet adds by itself, about the machine.
    for name in [name for name in curves if name.startswith(("sys.", "process duration"))]:
        assert sink == "comet"
        del curves[name]
    expected = {}
    for record in records:
        for name, value in record.items():
            if name not in UNSHOWN:
                # Event files have scalars of fp32.
                exact = float(np.float32(value)) if sink == "tensorboard" else value
                expected.setdefault(name, {})[str(record["step"])] = [exact]
    # The numbers of a step that ran again are those of its last run where the sink had not yet
    # been given the first; its times differ then, and all that follows from the data does not.
    times = {name for name in expected if "second" in name or name in ("time", "memory_bytes")}
    assert expected.keys() <= curves.keys() | times
    for name in expected.keys() - times:
        assert curves[name] == expected[name], name
    for name in times & curves.keys():
        assert all(len(values) == 1 for values in curves[name].values()), name
    assert not curves.keys() - expected.keys() - times


def test_a_resume_continues_the_same_remote_run(found):
    assert len(found["wandb"]["ids"]) == 1 and found["wandb"]["tags"] == ["small"]
    assert len(found["comet"]["keys"]) == 1
    assert found["mlflow"]["runs"] == found["trackio"]["runs"] == 1
    assert found["mlflow"]["status"] == "FINISHED"


def test_config_samples_and_files_go_along(found):
    steps = [3, 6, 9, 12]
    assert found["tensorboard"]["tables"] == steps
    assert found["tensorboard"]["text"].startswith("| step | prompt | text |\n| --- ")
    assert found["wandb"]["tables"] == steps
    assert found["trackio"]["tables"] == steps
    assert {f"samples/step-{step}.json" for step in steps} <= set(found["mlflow"]["files"])
    assert {f"samples-{step}.csv" for step in steps} <= set(found["comet"]["assets"])
    for files in (found["wandb"]["files"], found["mlflow"]["files"], found["comet"]["assets"]):
        assert {"config.yaml", "env.json"} <= set(files)
    assert "model" in found["wandb"]["config"] and float(found["mlflow"]["parameter"]) > 0
