"""The room works where there is numpy and nothing else, and in a loop that is not ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
for name in ("torch", "pydantic", "yaml", "transformers", "safetensors", "tokenizers", "fsspec"):
    sys.modules[name] = None
import numpy as np
from castalia.mixing import Planner, Stats, make_mixer
planner = Planner(make_mixer("odm", sources=["a", "b"]), sizes=[10, 20], rows=4, seed=1)
for step in range(1, 20):
    plan = planner.plan(step)
    planner.observe(Stats(step, np.array([1.0, 3.0]) * plan.counts, plan.counts))
print(planner.mixer.weights())
"""


def run(*command, folder=None):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, cwd=folder
    )


def test_numpy_is_all_it_needs():
    done = run("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    first, second = map(float, done.stdout.strip(" []\n").split())
    assert first < 0.5 < second


def test_the_example_in_a_plain_loop():
    """The source of noise is held at half of the data; of the others the harder one has more."""
    done = run(str(ROOT / "examples" / "mixing_plain.py"))
    assert done.returncode == 0, done.stderr
    weights = ast.literal_eval(done.stdout)
    assert weights["noise"] == 0.5
    assert weights["words"] > weights["digits"]


@pytest.mark.slow
def test_the_example_under_the_trainer_of_transformers(tmp_path):
    """It reads a step ahead, which the planner's lag allows."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    done = run(str(ROOT / "examples" / "mixing_transformers.py"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = ast.literal_eval(done.stdout.splitlines()[-1])
    assert weights["noise"] == 0.5
    assert weights["words"] > weights["digits"]
