"""Fixtures of every test."""

import sys
import tempfile
from pathlib import Path

import pytest

pytest_plugins = [
    "tests.fixtures.token_files",
    "tests.fixtures.short_run",
    "tests.fixtures.tiny_model",
    "tests.fixtures.hub_server",
    "tests.fixtures.harness_tasks",
    "tests.fixtures.browser",
    "tests.fixtures.live_page",
]


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
