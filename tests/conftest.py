"""Fixtures of every test, and how the tests share two workers."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from tests.fixtures.durations import Durations

# Each worker has a core; more threads than cores spin in each other's way. A single process has one
# thread, too: on a busy machine MKL takes fewer than it may, and sums in another order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = [
    "tests.fixtures.token_files",
    "tests.fixtures.short_run",
    "tests.fixtures.tiny_model",
    "tests.fixtures.training_shell",
    "tests.fixtures.command",
    "tests.fixtures.hub_server",
    "tests.fixtures.harness_tasks",
    "tests.fixtures.browser",
    "tests.fixtures.live_page",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the tests of this project."""
    group = parser.getgroup("castalia")
    group.addoption("--fast", action="store_true", help="only tests of the inner loop")
    group.addoption(
        "--record-durations", action="store_true", help="write tests/durations.json anew"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Time the tests, and arrange them by earlier times."""
    config.pluginmanager.register(Durations(config), "durations")


@pytest.fixture(scope="session", autouse=True)
def temporary_folder_of_processes():
    """The temporary folder of what tests start, gone at the end: torchrun and Ray leave folders
    behind.

    Its name is short, since Ray puts sockets into it, whose paths have 107 bytes at most.
    """
    temporary = tempfile.TemporaryDirectory(prefix="castalia-", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        # The tables that datasets makes of the tests' files; it may be imported already.
        patch.setenv("HF_DATASETS_CACHE", f"{folder}/datasets")
        if "datasets" in sys.modules:
            patch.setattr("datasets.config.HF_DATASETS_CACHE", Path(folder) / "datasets")
        yield
