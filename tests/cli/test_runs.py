"""`castalia runs`: how far each run is, from its files."""

import json
import os

import pytest

from castalia.analysis.run_list import find_runs
from castalia.core.files import claimed


@pytest.fixture
def run(tmp_path):
    """run(name, steps, losses, saved): a run folder as training leaves it."""

    def make(name, steps=4, losses=(), saved=(), rest=""):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
        for step in saved:
            place = folder / "checkpoints" / f"step-{step:08d}"
            place.mkdir()
            (place / "config.yaml").touch()
            (place / "COMPLETE").touch()
        (folder / "checkpoints" / "step-00000099").mkdir()  # one that was not finished
        lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + rest)
        return folder

    return make


def test_states(run, tmp_path, command, monkeypatch):
    run("done", losses=[3, 2.5, 2, 1.5], saved=[2, 4])
    run("group/stopped", losses=[3, 2.5, None], saved=[2], rest='{"step": 4, "lo')
    run("group/new")
    run("odd", steps="many")
    (tmp_path / "no-run").mkdir()
    with claimed(run("works", losses=[3], saved=[0])):
        found = {str(state.folder.relative_to(tmp_path)): state for state in find_runs(tmp_path)}
    facts = {
        name: (state.step, state.steps, state.loss, state.state, state.checkpoints)
        for name, state in found.items()
    }
    assert facts == {
        "done": (4, 4, 1.5, "done", [2, 4]),
        "group/new": (0, 4, None, "not begun", []),
        "group/stopped": (3, 4, 2.5, "stopped", [2]),
        "odd": (0, None, None, "unreadable", []),
        "works": (1, 4, 3, "running", [0]),
    }
    assert list(found) == sorted(found)
    # One of them alone, as text; the folder itself may be named, or be the present one.
    monkeypatch.chdir(tmp_path / "done")
    out = command("runs")[1].splitlines()
    assert out[0].split() == ["run", "step", "loss", "state", "checkpoints", "last", "step"]
    assert out[1].split()[:7] == [".", "4/4", "1.5000", "done", "2,", "newest", "4"]
    shown = json.loads(command("runs", tmp_path / "group", "--json")[1])
    assert [each["state"] for each in shown] == ["not begun", "stopped"]


def test_only_the_end_of_a_long_record_is_read(run, tmp_path):
    run("long", steps=9000, losses=[1 / step for step in range(1, 9001)])
    (state,) = find_runs(tmp_path)
    assert (state.step, state.loss, state.state) == (9000, 1 / 9000, "done")


def test_a_folder_that_goes_away_while_it_is_listed(run, tmp_path, monkeypatch):
    run("works", losses=[3])
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def scan(folder):
        if folder == tmp_path / "gone":
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr("castalia.analysis.run_list.os.scandir", scan)
    assert [state.folder.name for state in find_runs(tmp_path)] == ["works"]


def test_no_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("runs") == (0, "", "no runs in .; castalia train debug begins one\n")
    code, _, err = command("runs", "nowhere")
    assert code == 2 and "no folder nowhere" in err
