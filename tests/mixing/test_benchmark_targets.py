"""Where the mixing benchmark takes dynamic batch loading's targets from."""

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from castalia.corpora.build import CORPORA

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def mixing() -> ModuleType:
    """benchmarks/mixing.py, imported with its neighbours as top-level modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(CORPORA, "items", dict(CORPORA.items))
        return importlib.import_module("mixing")


@pytest.fixture
def bench(mixing, tmp_path):
    """A benchmark of two seeds whose uniform runs are finished."""
    bench = mixing.Bench.__new__(mixing.Bench)
    bench.options = argparse.Namespace(seeds=[1, 2], arms=None, size="quick")
    bench.scale, bench.folder = mixing.SCALES["quick"], tmp_path
    for seed in (1, 2):
        result = {"job": asdict(mixing.Job("uniform", seed, "uniform")), "curve": [[40, 9.0, 9.0]]}
        bench.path("uniform", seed).write_text(
            json.dumps(result | {"fed": [seed + 0.25, seed + 0.5]})
        )
    return bench


def test_targets_are_losses_on_the_rows_that_the_mixer_is_fed(bench):
    """Of another seed, and not those on the rows that are measured."""
    targets = {job.seed: job.options["target"] for job in bench.second() if job.arm == "dbl"}
    assert targets == {1: [2.25, 2.5], 2: [1.25, 1.5]}


def test_a_run_of_uniform_without_them_is_made_again(bench, mixing):
    """And no run of another arm is."""
    uniform, other = mixing.Job("uniform", 1, "uniform"), mixing.Job("odm", 1, "odm")
    bench.path("odm", 1).write_text(json.dumps({"job": asdict(other)}))
    assert bench.finished(uniform) and bench.finished(other)
    bench.path("uniform", 1).write_text(json.dumps({"job": asdict(uniform)}))
    assert not bench.finished(uniform) and not bench.finished(mixing.Job("uniform", 3, "uniform"))
