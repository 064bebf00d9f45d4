"""The wheel that `pip wheel .` makes: its tag, and the compiled step on a machine without a
compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from castalia.core import compilers
from castalia.core.levels import levels_here

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.slow,
    # A library for each level of each source is compiled, one after the other.
    pytest.mark.timeout(1500),
    pytest.mark.skipif(compilers.chosen_compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(not levels_here(), reason="no level for this processor"),
]


def wheel_of(folder: Path, **environment: str) -> Path:
    """Build a wheel of a copy of the sources, since setuptools writes beside them."""
    sources = folder / "sources"
    for name in COPIED:
        place = sources / name
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, place, ignore=left_out)
        else:
            shutil.copy(ROOT / name, place)
    command = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..')"]
    subprocess.run(command, cwd=sources, env={**os.environ, **environment}, check=True)
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_brings_the_compiled_step(tmp_path: Path) -> None:
    made = wheel_of(tmp_path)
    assert "-py3-none-" in made.name and not made.name.endswith("-any.whl")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "installed")
    program = "from castalia.native import compiled; print(compiled.level())"
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "CASTALIA_CXX": "none"}
    for level in levels_here():
        if not level.has_code:
            continue
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment, "CASTALIA_ISA": level.name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == level.name


def test_a_wheel_without_a_compiler_is_pure(tmp_path: Path) -> None:
    assert wheel_of(tmp_path, CASTALIA_CXX="none").name.endswith("-py3-none-any.whl")
