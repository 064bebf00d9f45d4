"""Fixtures of every test, and how the tests share two workers."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core; more threads than cores spin in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = [
    "tests.fixtures.token_files",
    "tests.fixtures.short_run",
    "tests.fixtures.tiny_model",
    "tests.fixtures.training_shell",
    "tests.fixtures.hub_server",
    "tests.fixtures.harness_tasks",
    "tests.fixtures.browser",
    "tests.fixtures.live_page",
]

LONGEST = (
    "tests/test_docs.py",
    "tests/distributed/test_grid.py",
    "tests/distributed/test_killed.py",
    "tests/distributed/test_pipeline.py",
)
"""Files of minutes. Workers begin with them, so that neither is left with one in the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, where several workers share the tests file by file."""
    if not hasattr(config, "workerinput"):
        return
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.split("::")[0], len(LONGEST)))


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
