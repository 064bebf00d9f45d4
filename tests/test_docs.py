"""Every block of README and docs runs, page after page in one folder, as a reader would do it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.fixtures.forked_shell import ForkedShell

ROOT = Path(__file__).resolve().parents[1]
CONTENTS = ROOT / "docs" / "README.md"
LINK = re.compile(r"\]\(([^)#:]+?\.md)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^(<!-- not run: .+? -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"^(\$ )?(castalia|python|pip|make|torchrun|srun|mpirun|lm_eval|from|import) ", re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block: whether it is marked as not run, its language and its text."""

    marked: bool
    language: str
    text: str


def pages() -> list[Path]:
    """README, the contents page and the pages in the order in which it links them."""
    linked = [(CONTENTS.parent / target).resolve() for target in LINK.findall(CONTENTS.read_text())]
    ordered = [ROOT / "README.md", CONTENTS, *linked]
    return list(dict.fromkeys(path for path in ordered if path.is_relative_to(ROOT)))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(bool(mark), *rest) for mark, *rest in BLOCK.findall(page.read_text())]


def commands(text: str) -> list[list[str]]:
    """The words of each `castalia` line of a ```sh block, without the command itself."""
    lines = text.replace("\\\n", " ").splitlines()
    every = [shlex.split(line, comments=True) for line in lines]
    for words in filter(None, every):
        assert words[0] == "castalia", f"only castalia commands are run: {shlex.join(words)}"
    return [words[1:] for words in every if words]


class Reader:
    """Reads the pages in order; a page builds on the files that earlier ones left."""

    def __init__(self, shell: ForkedShell) -> None:
        self.shell = shell
        self.unread = pages()

    def read(self, page: Path) -> None:
        """Run the blocks of all pages up to `page` that were not read yet."""
        while page in self.unread:
            for block in blocks(self.unread.pop(0)):
                if not block.marked:
                    self.run(block)

    def run(self, block: Block) -> None:
        """Run one block; a ```text or ```yaml block shows something and is not run."""
        if block.language == "python":
            done = self.shell.script(block.text)
            assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"
        if block.language == "sh":
            for words in commands(block.text):
                done = self.shell.castalia(words)
                assert done.returncode == 0, (
                    f"castalia {shlex.join(words)}\n{done.stdout}{done.stderr}"
                )


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    modules = ("castalia.cli", "castalia.export", "castalia.inference", "castalia.train.run")
    shell = ForkedShell(tmp_path_factory.mktemp("reader"), *modules)
    yield Reader(shell)
    shell.close()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, reader):
    reader.read(page)


def test_every_page_is_in_the_contents():
    assert {page.resolve() for page in (ROOT / "docs").rglob("*.md")} <= set(pages())


def test_a_command_is_run_or_marked_with_a_reason():
    for page in pages():
        for block in blocks(page):
            assert block.language, f"{page.name}: a block without a language:\n{block.text}"
            shown = block.language not in ("sh", "python") and not block.marked
            assert not (shown and COMMAND.search(block.text)), f"{page.name}:\n{block.text}"


def test_links_between_pages_lead_somewhere():
    for page in pages():
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_carries_a_place_of_one_machine():
    for page in pages():
        assert not re.search(r"/(work|home|root|tmp)/\w", page.read_text()), page.name
