"""The resharding matrix of moves.py: a checkpoint of any layout goes on under any other."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("moves.py")


def moves(*options: str) -> None:
    """Run the matrix, single-threaded, and show its table."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=1500
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.timeout(1600)
def test_moves_between_kinds_of_layout():
    moves()


@pytest.mark.slow
def test_moves_of_split_queries_keys_and_values():
    moves("--model", "llama")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_move_of_split_queries_keys_and_values():
    moves("--all", "--model", "llama")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_move():
    moves("--all")
