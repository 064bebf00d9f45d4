"""Damage every kind of file that Castalia writes, and record who notices it, and when.

    python -m tests.faults.matrix --write     # the table of docs/reliability.md; some minutes

For each file of tests/faults/world.py some bits are flipped one at a time, it is cut off at several
lengths, and removed. After each fault the commands run that a user would run next. A fault is
noticed if one of them ends with a sentence or says what is wrong; it is harmless if all of them
give what they give without it. The exit status is 1 if any fault is neither.
"""

import argparse
import importlib
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.forks import LOG, in_a_child, start, wait_for_all
from tests.faults.matrix_kinds import GIVEN, ROWS, Consumer, Library, Row
from tests.faults.world import build
from tests.fixtures.forked_rank import FAULT, run_and_exit
from tests.fixtures.forked_shell import TRAINING

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- table: python -m tests.faults.matrix --write -->"
END = "<!-- end of the table -->"
MODULES = (
    *TRAINING,
    *("castalia.export", "castalia.inference", "castalia.integrity.checking"),
    *("castalia.curate.verify", "castalia.stream.index", "castalia.memorization.job"),
    *("castalia.eval.bits", "castalia.eval.losses", "pandas", "pyarrow.parquet", "duckdb"),
    *("ctranslate2", "llama_cpp"),
)
"""What the commands import, loaded before the forks."""
FLIPS = 3
"""Bits of a file that are flipped, one at a time."""
SEED = 19
NOTICE = re.compile(
    r"damaged|corrupt|missing|not the one|is not |no such|skipp|anew|repair|refus|cannot|unlike"
    r"|differ|incomplete|left over|cut off|changed",
    re.IGNORECASE,
)
"""Words of a sentence about a fault, by a command that goes on."""
TIMES = re.compile(
    r"\d[\d.]* ?[kM]? ?(ms|s|tok/s|tokens/s)\b|seconds\": [\d.e-]+|process \d+|\d+[smh] ago"
)
"""What two runs of the same command print differently."""


@dataclass
class Outcome:
    """What the commands after one fault said: `noticed`, `harmless`, or what is wrong."""

    verdict: str
    by: str = ""
    """The command that noticed it."""
    words: str = ""
    """The beginning of its sentence, or how the result differs."""


@dataclass
class Cell:
    """One kind of file under one kind of fault."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether each fault was noticed or harmless."""
        return all(each.verdict in ("noticed", "harmless") for each in self.outcomes)

    def text(self, row: Row) -> str:
        """The cell of the table."""
        if not self.outcomes:
            return "cannot be: the file is empty"
        parts = []
        for (verdict, by), count in Counter((o.verdict, o.by) for o in self.outcomes).most_common():
            share = f" ({count} of {len(self.outcomes)})" if count < len(self.outcomes) else ""
            if verdict == "harmless":
                parts.append(f"harmless{share}: {row.harmless or 'the results are equal'}")
                continue
            words = Counter(o.words for o in self.outcomes if (o.verdict, o.by) == (verdict, by))
            parts.append(f"{verdict} by {by}{share}: {words.most_common(1)[0][0]}")
        return "; ".join(parts)

    def verdicts(self) -> str:
        """The words that a later run must repeat."""
        return " and ".join(sorted({each.verdict for each in self.outcomes}))


def faults_of(path: Path, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Kind of fault, and the bytes that the file has then; None is its absence."""
    content = path.read_bytes()
    for _ in range(FLIPS if content else 0):
        data = bytearray(content)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield "flip", bytes(data)
    for length in sorted({0, len(content) // 2, max(0, len(content) - 1)}):
        if length < len(content):
            yield "truncation", content[:length]
    yield "missing", None


@dataclass
class Result:
    """What a consumer did."""

    code: int
    printed: str
    made: str
    """Digest of what it made, or printed if it makes no files."""


class Matrix:
    """Runs consumers in copies of the undamaged files, all in one place, so that paths agree."""

    def __init__(self, root: Path) -> None:
        self.whole = root / "whole"
        self.place = root / "damaged"
        self.expected: dict[Consumer, Result] = {}

    def build(self) -> None:
        """Make the undamaged files, unless an earlier call has made all of them."""
        if self.whole.exists():
            return
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

        def run(words: tuple[str, ...]) -> None:
            code = wait_for_all(start(self.place, lambda: run_and_exit(list(words))))
            if code != [0]:
                raise RuntimeError(f"{words}: {(self.place / LOG).read_text()[-2000:]}")

        build(self.place, run)
        wait_for_all(start(self.place, Library("", ()).run))
        # Made where they will be damaged: some files name others by whole paths.
        self.place.rename(self.whole)

    def copy(self, needs: str) -> None:
        """A new copy of some of the files."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for name in needs.split():
            source = self.whole / name
            target = self.place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy2(source, target)

    def consume(self, consumer: Consumer) -> Result:
        """Run one consumer where the copy is."""
        (self.place / LOG).unlink(missing_ok=True)
        (code,) = wait_for_all(start(self.place, consumer.run))
        printed = (self.place / LOG).read_text(errors="replace")
        made = TIMES.sub("#", printed)
        if consumer.makes is not None and code == 0:
            made = ""
        if consumer.makes and code == 0:
            made = in_a_child(lambda: consumer.digest(self.place))
        return Result(code, printed, made)

    def undamaged(self, consumer: Consumer, needs: str) -> Result:
        """The result without a fault; computed once."""
        if consumer not in self.expected:
            self.copy(needs)
            result = self.consume(consumer)
            if result.code:
                raise RuntimeError(f"{consumer.name} fails without a fault: {result.printed}")
            self.expected[consumer] = result
        return self.expected[consumer]

    def outcome(self, row: Row, name: str, data: bytes | None) -> Outcome:
        """What the consumers of a row make of one damaged file."""
        silent = ""
        for consumer in row.consumers:
            expected = self.undamaged(consumer, row.needs)
            # Each has its own copy: a consumer may repair or replace the file.
            self.copy(row.needs)
            if data is None:
                (self.place / name).unlink()
            else:
                (self.place / name).write_bytes(data)
            result = self.consume(consumer)
            if crashed(result):
                return Outcome("CRASHED", consumer.name, sentence(result.printed))
            if result.code or told(result, expected):
                words = sentence(new_lines(result, expected))
                if silent and not row.only_by_check:
                    return Outcome("UNNOTICED", silent, f"only {consumer.name} noticed it: {words}")
                return Outcome("noticed", consumer.name, words)
            if result.made != expected.made:
                silent = silent or consumer.name
        if silent:
            return Outcome("UNNOTICED", silent, "another result")
        return Outcome("harmless")

    def cells(self, row: Row) -> dict[str, Cell]:
        """The three cells of one row."""
        cells = {fault: Cell() for fault in ("flip", "truncation", "missing")}
        for name in row.files_in(self.whole):
            # The faults of a file do not depend on the files before it.
            draw = random.Random(f"{SEED} {name}")
            for fault, data in faults_of(self.whole / name, draw):
                outcome = self.outcome(row, name, data)
                cells[fault].outcomes.append(outcome)
                if outcome.verdict not in ("noticed", "harmless"):
                    print(f"  {name}, {fault}: {outcome}", flush=True)
        return cells


def crashed(result: Result) -> bool:
    """Whether a command ended otherwise than with a sentence."""
    return result.code < 0 or result.code in (FAULT, 98) or "Traceback" in result.printed


def new_lines(result: Result, expected: Result) -> str:
    """The printed lines that the undamaged files do not cause."""
    known = {TIMES.sub("#", line) for line in expected.printed.splitlines()}
    return "\n".join(
        line for line in result.printed.splitlines() if TIMES.sub("#", line) not in known
    )


def told(result: Result, expected: Result) -> bool:
    """Whether a command that went on said what is wrong."""
    return bool(NOTICE.search(new_lines(result, expected)))


def sentence(printed: str) -> str:
    """The beginning of the sentence about a fault, without what another run would not repeat."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    about = [line for line in lines if NOTICE.search(line)]
    line = [*about, *[line for line in lines if "error:" in line], *lines[-1:], "(nothing)"][0]
    line = re.sub(r"^.*?(error|Warning|warning|note):\s*", "", line)
    line = re.sub(r"[\w.-]*/[\w./-]*/", "", line)
    # Not the number in SHA-256 or utf-8, which is a part of a name.
    line = re.sub(r"\b[0-9a-f]{8,}\b|(?<!SHA-)(?<!sha)(?<!utf-)\b\d+|(?<=-)\d{5,}", "N", line)
    line = line.replace("|", "/")
    words = line.split()
    return " ".join(words[:12]) + (" ..." if len(words) > 12 else "")


def unlisted(whole: Path) -> list[str]:
    """Files of the world that no row has, so that a new kind of file gets one."""
    listed = {name for row in ROWS for name in row.files_in(whole, every=True)}
    listed |= {path.name for pattern in GIVEN for path in whole.glob(pattern)}
    files = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    return sorted(files - listed - {LOG})


def verdicts(cells: dict[str, dict[str, Cell]]) -> dict[str, list[str]]:
    """The verdicts of each row, which the committed table must have too."""
    return {name: [cell.verdicts() for cell in row.values()] for name, row in cells.items()}


def committed() -> dict[str, list[str]]:
    """The verdicts of the table of the page."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    found: dict[str, list[str]] = {}
    for line in text.strip().splitlines()[2:]:
        name, *cells = [part.strip() for part in line.strip("|").split("|")]
        found[name] = [" and ".join(sorted(set(re.findall("noticed|harmless", c)))) for c in cells]
    return found


def write(cells: dict[str, dict[str, Cell]]) -> None:
    """Put the measured rows on the page; its other rows stay."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in old.strip().splitlines()[2:]}
    for row in ROWS:
        if row.name in cells:
            texts = [cell.text(row) for cell in cells[row.name].values()]
            lines[row.name] = f"| {row.name} | {' | '.join(texts)} |"
    ordered = [lines[row.name] for row in ROWS if row.name in lines]
    head = ["| file | flipped bit | truncated | missing |", "|---|---|---|---|"]
    PAGE.write_text("\n".join([before + BEGIN, *head, *ordered, END]) + after)


def measure(root: Path, only: Sequence[str] = ("",)) -> dict[str, dict[str, Cell]]:
    """All cells, by row; prints each row as it is done."""
    for module in MODULES:
        importlib.import_module(module)
    matrix = Matrix(root)
    matrix.build()
    if missing := unlisted(matrix.whole):
        raise RuntimeError(f"no row of the table has {', '.join(missing)}")
    cells: dict[str, dict[str, Cell]] = {}
    for row in ROWS:
        if any(part in row.name for part in only):
            cells[row.name] = matrix.cells(row)
            print(
                f"{row.name}:",
                *[cell.text(row) for cell in cells[row.name].values()],
                sep="\n    ",
                flush=True,
            )
    return cells


def main() -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one")
    parser.add_argument(
        "--folder", type=Path, help="keep the undamaged files here, for another run"
    )
    parser.add_argument("--write", action="store_true", help=f"write the table of {PAGE.name}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        cells = measure(options.folder or Path(temporary), options.only)
    if options.write:
        write(cells)
    bad = [name for name, row in cells.items() if not all(cell.ok for cell in row.values())]
    print(f"{len(cells)} kinds of files; {len(bad)} with faults unnoticed: {', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
