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
EXACT = ("loss", "lr", "grad_norm", "tokens")
"""What follows from the data, and is the same when a step runs again."""
RAN_AGAIN = ("5", "6", "7")
"""The run was killed after step 7 and had saved step 4."""


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
    # A step that was delivered before the kill lacks what its second run alone has.
    late = {name for name, curve in expected.items() if curve.keys() <= {*RAN_AGAIN}}
    assert expected.keys() - late <= curves.keys() <= expected.keys()
    for name, curve in expected.items():
        if name not in curves:
            continue
        assert {step: len(values) for step, values in curves[name].items()} == dict.fromkeys(
            curves[name], 1
        ), name
        for step, values in curve.items():
            # A step that ran again has the times of its first run where a sink had been given it.
            if step not in RAN_AGAIN or name in EXACT or name.startswith("sources/"):
                assert curves[name][step] == values, (name, step)


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
