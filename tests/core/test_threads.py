"""The threads of compiled code: many callers, forks, and no work after a call."""

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from castalia.core import compilers, native_code
from castalia.core.levels import levels_here

pytestmark = pytest.mark.skipif(
    compilers.chosen_compiler() is None or not levels_here(), reason="no C++ compiler here"
)


@pytest.fixture(scope="module", params=["its own", "torch's"])
def team(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """team.cpp on threads of its own, and on those of torch."""
    compiler = compilers.chosen_compiler()
    assert compiler is not None
    level = next(level for level in levels_here() if level.has_code)
    code = compilers.compiled_code(Path(__file__).with_name("team.cpp"), compiler, level)
    loaded = native_code.load(code, "team")
    loaded.wrong_sums.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
    loaded.wrong_sums.restype = ctypes.c_long
    if request.param == "torch's":
        torch.ones(1 << 20).sum()
        native_code.lend_threads(loaded)
    return loaded


def test_several_callers_have_teams_of_their_own(team: ctypes.CDLL) -> None:
    sizes = [1, 2, 3, 2, 5, 1, 4, 3] * 6
    with ThreadPoolExecutor(4) as callers:
        wrong = list(callers.map(lambda threads: team.wrong_sums(threads, 101, 40), sizes))
    assert wrong == [0] * len(sizes)


def test_a_child_starts_its_own_team(team: ctypes.CDLL) -> None:
    assert team.wrong_sums(3, 100, 5) == 0
    child = os.fork()
    if child == 0:
        os._exit(int(team.wrong_sums(3, 100, 5)))
    assert os.waitpid(child, 0)[1] == 0
    assert team.wrong_sums(3, 100, 5) == 0


def test_waiting_threads_sleep(team: ctypes.CDLL) -> None:
    team.wrong_sums(2, 100, 5)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
