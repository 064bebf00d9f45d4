"""The equivalence grid of grid.py: its core, all of it, and what it says of wrong plans."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("grid.py")
WRONG = {
    "qkv split off head boundaries": "tp=2",
    "row bias on every process": "tp=2",
    "maximum of the own tokens": "tp=2",
    "places counted on each process": "cp=2",
    "keys in the order of the processes": "cp=2",
    "the first head of keys": "tp=4",
    "gradients of the own heads": "tp=2",
    "dropout counted on each process": "cp=2 tp=2",
    "rows of experts as they arrive": "dp_shard=2 ep=2",
}
"""Wrong plans with the degrees of the layout that each breaks."""


@pytest.fixture(scope="module")
def grid(program):
    """grid(*options): run the grid, single-threaded, and show its table."""

    def run(*options):
        done = program(SCRIPT, *options, limit=1500)
        print(done.stdout)
        return done

    return run


@pytest.mark.timeout(1600)
def test_the_core_equals_one_process(grid):
    done = grid()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_layout_equals_one_process(grid):
    done = grid("--all")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.fixture(scope="module")
def sabotaged(grid, tmp_path_factory):
    """The differences of every wrong plan, by its name and degrees; one program makes them all."""
    path = tmp_path_factory.mktemp("sabotaged") / "found.json"
    done = grid("--sabotage", "--json", str(path))
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found.keys() == {f"{wrong} ({degrees})" for wrong, degrees in WRONG.items()}
    return found


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_fails(sabotaged, wrong):
    found = sabotaged[f"{wrong} ({WRONG[wrong]})"]
    assert not found["passes"], found
    assert found["same rows"] and found["tokens"] == 0, "it fails for another reason"
