"""The archive of the sources holds what its tests, `make` and a wheel are made of."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = {".git", ".ci", ".gitignore"}
"""What belongs to the repository alone."""


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the archive, by their paths in the repository."""
    folder = tmp_path_factory.mktemp("sdist")
    sources = folder / "sources"
    sources.mkdir()
    # setuptools writes beside the sources, and into src; all else it only reads.
    (sources / "src").mkdir()
    (sources / "src" / "castalia").symlink_to(ROOT / "src" / "castalia")
    for item in ROOT.iterdir():
        if item.name != "src" and (item.name[0] != "." or item.name == ".dockerignore"):
            (sources / item.name).symlink_to(item)
    words = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_sdist('..')"]
    subprocess.run(words, cwd=sources, check=True, capture_output=True)
    (made,) = folder.glob("castalia-*.tar.gz")
    with tarfile.open(made) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def tracked() -> list[str]:
    """The files of the repository."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a clone")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_every_file_of_the_repository_is_in_the_archive(archived: set[str]) -> None:
    missing = [
        name for name in tracked() if name not in archived and name.partition("/")[0] not in UNKNOWN
    ]
    assert not missing, missing
    sources = [name for name in archived if name.endswith((".cpp", ".h"))]
    assert len(sources) >= 5 and not [name for name in archived if name.endswith(".pyc")]
