"""Every command and every Python example in README and docs runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SETUP = {
    "training.md": ["castalia prepare corpus.jsonl --tokenizer bytes --output data/bytes"],
    "demo.md": [
        "castalia train demo output=runs/demo train.steps=1 train.batch_size=2 precision=fp32"
    ],
    "inference.md": ["castalia train debug output=runs/first train.steps=20"],
    "report.md": [
        "castalia train debug output=runs/first train.steps=2",
        "castalia train debug output=runs/second train.steps=2",
    ],
}
"""Commands of other pages that a page builds on."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the blocks that a reader can run, ```sh and ```python, not ```text."""
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text())]


def run_command(line: str, folder: Path) -> None:
    """Run one `castalia ...` line in `folder`."""
    words = shlex.split(line, comments=True)
    assert words[0] == "castalia", f"only castalia commands are run: {line}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "castalia", *words[1:]]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_what_a_page_shows_runs(page, tmp_path):
    texts = [path.read_text() for path in sorted((ROOT / "src" / "castalia").rglob("*.py"))]
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    for line in SETUP.get(page.name, []):
        run_command(line, tmp_path)
    for language, text in blocks(page):
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    run_command(line, tmp_path)
        else:
            done = subprocess.run(
                [sys.executable, "-c", text],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_carries_a_place_of_one_machine():
    for page in PAGES:
        assert not re.search(r"/(work|home|root|tmp)/\w", page.read_text()), page.name
