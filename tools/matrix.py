"""Castalia's wheel on several versions of Python and torch, each in an environment of its own.

    python tools/matrix.py --python 3.11,3.13 --torch 2.13.0,2.14.1
    python tools/matrix.py --torch 2.11.0 --tests tests/models,tests/optim --keep

One wheel is built and installed beside each torch; a run is trained, generated from and exported,
then the quick tests of the inner loop run against the installed package. Prints a table; the exit
status is 1 if anything failed. Pythons are looked for as pythonX.Y on PATH and in ~/.pyenv. A torch
of the package registry is a CUDA build of several GB on Linux; pip's own settings choose another.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "hf,optim,s3,results,count,dedup,chat,spm,ftfy,trace"
"""What the quick tests import beside the requirements."""
TOOLS = (
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "psutil",
    "scipy",
    "schedulefree",
)
FOLDERS = ("core", "config", "mixing", "models", "optim", "losses", "recurrent", "tokenizers")
"""Folders of tests that run by default: those whose code depends on Python and torch the most."""
SMALL = "model.num_layers=1 model.hidden_size=32 train.batch_size=2 train.steps=4"
SECONDS = 1800


@dataclass
class Cell:
    """One pair of versions and what came of it."""

    python: str
    torch: str
    program: Path | None
    installed: str = "-"
    """Version of torch as it calls itself, or why it is not there."""
    works: str = "-"
    """Training, generation and export."""
    tests: str = "-"
    failed: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything that was asked for worked."""
        return self.works == "ok" and not self.failed

    def row(self) -> list[str]:
        """The line of the table."""
        return [self.python, self.torch, self.installed, self.works, self.tests]


def found_python(version: str) -> Path | None:
    """The interpreter of a version such as 3.12; None if it is not here."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    # Before PATH, where shims answer to every version and run one.
    if pyenv:
        return pyenv[-1]
    here = shutil.which(f"python{version}")
    return None if here is None else Path(here)


def run(words: list[str], cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command, its output kept."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        return subprocess.run(
            words,
            cwd=cwd,
            env=clean | settings,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # A failure of one pair; the table has the others.
        return subprocess.CompletedProcess(words, 124, "", f"did not end within {SECONDS} s")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The reason of a failure."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1][:100] if lines else f"status {done.returncode}"


def copy_sources(folder: Path) -> Path:
    """The repository as it is now: setuptools writes beside the sources, and they may change while
    environments are installed."""
    sources = folder / "sources"
    names = ("__pycache__", "*.egg-info", ".*", "build", "dist", "runs")
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*names))
    return sources


def build_wheel(sources: Path) -> Path:
    """The wheel of the sources, beside them."""
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "..", "."]
    done = run(words, sources)
    if done.returncode:
        sys.exit(f"the wheel cannot be built: {last_line(done)}")
    (wheel,) = sources.parent.glob("castalia-*.whl")
    return wheel


def install(cell: Cell, wheel: Path, folder: Path) -> Path | None:
    """An environment with torch and the wheel; None, with the reason in the cell, without."""
    assert cell.program is not None
    python = folder / "bin" / "python"
    # Tested versions of all but torch, which is what varies.
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = folder.parent / f"{folder.name}.txt"
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("torch==")))
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    steps = [
        [str(cell.program), "-m", "venv", str(folder)],
        # First, so that nothing else chooses its version.
        [*pip, f"torch=={cell.torch}"],
        [*pip, "-c", str(constraints), f"torch=={cell.torch}", f"{wheel}[{EXTRAS}]", *TOOLS],
    ]
    for words in steps:
        done = run(words, folder.parent)
        if done.returncode:
            cell.installed = f"not installed: {last_line(done)}"
            return None
    version = run([str(python), "-c", "import torch; print(torch.__version__)"], folder.parent)
    cell.installed = version.stdout.strip() or last_line(version)
    return python if version.returncode == 0 else None


def try_verbs(cell: Cell, python: Path, folder: Path) -> None:
    """Train, generate and export, as a user would."""
    castalia = [str(python), "-m", "castalia"]
    verbs = {
        "train": ["train", "debug", *SMALL.split(), "output=run"],
        "generate": ["generate", "run", "--prompt", "a", "--max-new-tokens", "4"],
        "export": ["export", "run", "--to", "native", "--output", "native"],
        "upload": ["upload", "run", "--repo", "me/run", "--dry-run"],
    }
    for name, words in verbs.items():
        done = run([*castalia, *words], folder, HF_TOKEN="")
        if done.returncode:
            cell.works = f"{name}: {last_line(done)}"
            return
    cell.works = "ok"


def try_tests(cell: Cell, python: Path, folder: Path, sources: Path, tests: list[str]) -> None:
    """The quick tests, counted from their report."""
    report = folder / "tests.xml"
    words = [str(python), "-m", "pytest", "--fast", "-q", *tests, f"--junitxml={report}"]
    # A file that does not import is a failure of its own; the others run all the same.
    words.append("--continue-on-collection-errors")
    done = run(words, sources)
    if not report.is_file():
        cell.tests = f"did not run: {last_line(done)}"
        cell.failed = [cell.tests]
        return
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if any(part.tag in ("failure", "error") for part in case)]
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    cell.failed = [f"{case.get('classname')}.{case.get('name')}" for case in bad]
    passed = len(cases) - len(bad) - skipped
    cell.tests = f"{passed} passed, {len(bad)} failed, {skipped} skipped"


def try_cell(
    cell: Cell, wheel: Path, sources: Path, work: Path, tests: list[str], keep: bool
) -> None:
    """Everything about one pair of versions."""
    if cell.program is None:
        cell.installed = f"no python{cell.python} here"
        cell.failed = [cell.installed]
        return
    folder = work / f"py{cell.python}-torch{cell.torch}"
    place = work / f"{folder.name}-files"
    # What an earlier call with --keep left: verbs refuse to write over it.
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    python = install(cell, wheel, folder)
    if python is not None:
        try_verbs(cell, python, place)
        try_tests(cell, python, place, sources, tests)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)


def print_table(cells: list[Cell]) -> None:
    """The table, and the names of what failed."""
    head = ["python", "torch", "installed", "train, generate, export", "quick tests"]
    rows = [head, *(cell.row() for cell in cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    for cell in cells:
        for name in cell.failed:
            print(f"failed on python {cell.python}, torch {cell.torch}: {name}")


def main() -> None:
    """Read the options, try every pair."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = next(pin.partition("==")[2] for pin in pins if pin.startswith("torch=="))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=here, help="versions such as 3.11,3.13")
    parser.add_argument("--torch", default=tested, help="versions such as 2.13.0,2.14.1")
    parser.add_argument("--tests", default=",".join(f"tests/{name}" for name in FOLDERS))
    parser.add_argument("--wheel", metavar="FILE", help="a wheel that is built already")
    parser.add_argument("--work", help="folder of the environments; by default a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    asked = parser.parse_args()
    cells = [
        Cell(python, torch, found_python(python))
        for python in asked.python.split(",")
        for torch in asked.torch.split(",")
    ]
    with tempfile.TemporaryDirectory(prefix="castalia-matrix-") as temporary:
        work = Path(asked.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        sources = copy_sources(Path(temporary))
        wheel = Path(asked.wheel).resolve() if asked.wheel else build_wheel(sources)
        for cell in cells:
            start = time.perf_counter()
            try_cell(cell, wheel, sources, work, asked.tests.split(","), asked.keep)
            seconds = time.perf_counter() - start
            print(f"{' '.join(cell.row())}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print_table(cells)
    sys.exit(not all(cell.good for cell in cells))


if __name__ == "__main__":
    main()
