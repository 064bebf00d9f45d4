"""The equivalence grid of grid.py: its core, all of it, and what it says of wrong plans."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("grid.py")


def grid(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the grid, single-threaded, and show its table."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=1500
    )
    print(done.stdout)
    return done


def test_the_core_equals_one_process():
    done = grid()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_layout_equals_one_process():
    done = grid("--all")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("wrong", "row"),
    [
        ("qkv split off head boundaries", "tp, accumulated tp=2"),
        ("row bias on every process", "tp, accumulated tp=2"),
        ("maximum of the own tokens", "tp, accumulated tp=2"),
        ("places counted on each process", "cp, recompute cp=2"),
        ("keys in the order of the processes", "cp, recompute cp=2"),
        ("the first head of keys", "tp, llama tp=4"),
        ("gradients of the own heads", "tp, gpt2 tp=2"),
        ("dropout counted on each process", "tp x cp, llama with dropout cp=2"),
    ],
)
def test_a_wrong_plan_fails(wrong, row):
    done = grid("--only", row, "--sabotage", wrong)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert "0 of 1 layouts equal one process" in done.stdout, done.stdout + done.stderr[-3000:]
