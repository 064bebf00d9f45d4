"""Every block of README and docs runs, page after page in one folder, as a reader would do it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.fixtures.forked_shell import ForkedShell

from castalia.pages.markdown import anchor

ROOT = Path(__file__).resolve().parents[1]
CONTENTS = ROOT / "docs" / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
LINK = re.compile(r"\]\(([^)#:]+?\.md)(?:#[^)]*)?\)")
LINK_AND_PLACE = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
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


def require_output(shown: str, printed: str) -> None:
    """What a page shows must be the end of what was printed, whatever the numbers; a line in
    quotes is text that a model wrote."""
    expected = [re.sub(r"[\d.,]+", "N", line) for line in shown.splitlines()]
    lines = [re.sub(r"[\d.,]+", "N", line) for line in printed.splitlines()]
    found = lines[len(lines) - len(expected) :]
    written = [line.startswith(("'", '"')) for line in expected]
    assert [line.startswith(("'", '"')) for line in found] == written, printed
    for line, other, by_model in zip(expected, found, written, strict=True):
        assert by_model or line == other, f"shown:\n{shown}\nprinted:\n{printed}"


class Reader:
    """Reads the pages in order; a page builds on the files that earlier ones left."""

    def __init__(self, shell: ForkedShell) -> None:
        self.shell = shell
        self.unread = pages()

    def read(self, page: Path) -> None:
        """Run the blocks of all pages up to `page` that were not read yet."""
        while page in self.unread:
            self.read_page(self.unread.pop(0))

    def read_page(self, page: Path) -> None:
        """Run the blocks of one page; of the tutorial each tells what the one before printed."""
        printed = ""
        for block in blocks(page):
            if page == TUTORIAL and block.language == "text":
                require_output(block.text, printed)
            elif not block.marked:
                printed = self.run(block)

    def run(self, block: Block) -> str:
        """Run one block and return what it printed; a ```text or ```yaml block shows something
        and is not run."""
        if block.language == "python":
            done = self.shell.script(block.text)
            assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"
            return done.stdout
        if block.language == "sh":
            for words in commands(block.text):
                done = self.shell.castalia(words)
                assert done.returncode == 0, (
                    f"castalia {shlex.join(words)}\n{done.stdout}{done.stderr}"
                )
        return ""


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    shell = ForkedShell(tmp_path_factory.mktemp("reader"), "warm_reader")
    yield Reader(shell)
    shell.close()


# A page that is asked for alone runs all before it, and each command has a limit of its own.
@pytest.mark.timeout(1600)
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


def anchors(page: Path) -> set[str]:
    """The anchors of a page as GitHub makes them; a heading that comes again gets a number."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        # A link in a heading counts with its text alone.
        name = anchor(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        found[name] = found.get(name, 0) + 1
    again = {f"{name}-{n}" for name, count in found.items() for n in range(1, count)}
    return found.keys() | again


def test_links_between_pages_lead_somewhere():
    known = {page: anchors(page) for page in pages()}
    for page in pages():
        for target, place in LINK_AND_PLACE.findall(page.read_text()):
            other = (page.parent / target).resolve() if target else page
            assert other.exists(), f"{page.name} links to {target}"
            if place and other.suffix == ".md":
                assert place in known[other], f"{page.name} links to {target}#{place}"


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b.c`: d, e_f!\n## Same\n```sh\n# no heading\n```\n## Same\n")
    assert anchors(page) == {"a-bc-d-e_f", "same", "same-1"}


def test_no_page_carries_a_place_of_one_machine():
    for page in pages():
        assert not re.search(r"/(work|home|root|tmp)/\w", page.read_text()), page.name
