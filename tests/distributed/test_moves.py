"""The resharding matrix of moves.py: a checkpoint of any layout goes on under any other."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("moves.py")


@pytest.fixture
def moves(program):
    """moves(*options): run the matrix, single-threaded, and show its table."""

    def run(*options):
        done = program(SCRIPT, *options, limit=1500)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    return run


@pytest.mark.timeout(1600)
def test_moves_between_kinds_of_layout(moves):
    moves()


@pytest.mark.slow
def test_moves_of_split_queries_keys_and_values(moves):
    moves("--model", "llama")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_move_of_split_queries_keys_and_values(moves):
    moves("--all", "--model", "llama")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_move(moves):
    moves("--all")
