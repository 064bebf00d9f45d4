import os
import re
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import Store, complete_steps, find_checkpoint, newest_first
from castalia.checkpoint.find import remedy
from castalia.core.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "small"
    store = Store(folder / "checkpoints")
    for step in (0, 1, 1000):
        store.save(step, {"model.a": torch.zeros(2)}, {}, asynchronous=False)
    return folder


@pytest.mark.parametrize(
    "name", ["step1000", "1000", "step-1000", "step-00001000", "checkpoints/step1000"]
)
def test_a_step_of_a_run(run, name):
    assert find_checkpoint(run / name).samefile(run / "checkpoints" / "step-00001000")


def test_other_ways_to_name_one(run):
    step_1 = run / "checkpoints" / "step-00000001"
    assert find_checkpoint(f"{run}@1") == step_1
    assert find_checkpoint(f"{run}@step1") == step_1
    assert find_checkpoint(step_1) == step_1
    newest = run / "checkpoints" / "step-00001000"
    assert find_checkpoint(run) == newest
    assert find_checkpoint(run / "checkpoints") == newest
    assert find_checkpoint(str(run) + "/") == newest
    for folder, meant in ((run, newest), (step_1, step_1)):
        (folder / "config.yaml").touch()
        assert find_checkpoint(folder / "config.yaml") == meant
    assert newest_first(run / "config.yaml") == newest_first(run)


@pytest.mark.parametrize("name", ["step7", "7", "@7", "final"])
def test_a_wrong_step_gets_the_list(run, name):
    path = f"{run}@7" if name == "@7" else run / name
    with pytest.raises(CheckpointError, match=r"choose one of 0, 1, 1000"):
        find_checkpoint(path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at"):
        find_checkpoint(tmp_path / "nowhere" / "step3")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in"):
        find_checkpoint(tmp_path)


def test_a_mistyped_run_is_named(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    for name, near in {
        "rnus/small": "runs/small",
        "runs/smal": "runs/small",
        "rnus/x": "runs",
    }.items():
        with pytest.raises(
            CheckpointError, match=rf"no checkpoint at {name}.*did you mean '{near}'\?"
        ):
            find_checkpoint(name)
    assert "did you mean" not in remedy(Path("runs"))  # it is there, and holds nothing
    for name, hint in {
        "elsewhere/small": "give a run folder, or RUN/step1000",
        "small": "did you mean 'runs/small'?",  # as a preset is typed, whose run is in `runs`
        "runs/x": "`castalia runs runs` lists the runs there",
    }.items():
        with pytest.raises(CheckpointError, match=rf"; {re.escape(hint)}$"):
            find_checkpoint(name)


def test_a_folder_without_complete_does_not_exist(run):
    os.unlink(run / "checkpoints" / "step-00001000" / "COMPLETE")
    assert complete_steps(run / "checkpoints") == [0, 1]
    assert find_checkpoint(run).name == "step-00000001"
    with pytest.raises(CheckpointError, match=r"not completely.*choose one of 0, 1"):
        find_checkpoint(run / "step1000")
    with pytest.raises(CheckpointError, match=r"not completely.*choose one of 0, 1"):
        find_checkpoint(run / "checkpoints" / "step-00001000")
