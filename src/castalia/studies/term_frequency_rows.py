"""Rows of the term-frequency study: accuracies by operand, kept as lines and read from CSV."""

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, read_json, write_json

COLUMNS = ("model", "checkpoint", "task", "fewshot", "acc", "acc_stderr")
"""Of the published files."""
TASK = re.compile(r"num_reasoning_arithmetic_(\w+)_(\d+)")
PUBLISHED_SIZES = {
    "19m": "70m", "125m": "160m", "350m": "410m", "800m": "1b",
    "1.3b": "1.4b", "2.7b": "2.8b", "6.7b": "6.9b", "13b": "12b",
}  # fmt: skip
"""Names of sizes before Pythia was renamed, in the published files."""

Frequencies = Mapping[tuple[str, int, int], int]
"""(model, step, operand) -> occurrences before the checkpoint."""


class Key(NamedTuple):
    """What is measured at once: all operands of a task."""

    model: str
    step: int
    task: str
    shots: int


class Row(NamedTuple):
    """Accuracy of one first operand."""

    model: str
    step: int
    task: str
    shots: int
    x1: int
    right: float
    """Share of the right answers."""
    stderr: float

    @property
    def key(self) -> Key:
        """What it was measured with."""
        return Key(self.model, self.step, self.task, self.shots)


def row_of(key: Key, x1: int, right: int, count: int) -> Row:
    """The accuracy of an operand with `right` of `count` answers right.

    The standard error is that of lm-evaluation-harness: the sample deviation over sqrt(count).
    """
    share = right / count
    spread = math.sqrt(share * (1 - share) / max(1, count - 1))
    return Row(*key, x1, share, spread)


def place_of(model: str, step: int) -> str:
    """A checkpoint's name in the file of hashes."""
    return f"{model} step {step}"


@dataclass(frozen=True)
class RowFile:
    """Rows as JSON lines beside the options that they were measured with."""

    folder: Path

    def begin(self, options: Mapping[str, Any]) -> list[Row]:
        """The rows that are there, measured with the same options.

        Raises  ConfigError if the folder holds a study with others.
        """
        path = self.folder / "study.json"
        if not path.is_file():
            write_json(path, dict(options))
            return []
        before = read_json(path)
        for name, value in options.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{self.folder} holds a study with {name} {before.get(name)!r}, now it is"
                    f" {value!r}; choose another --output"
                )
        return self.read()

    def read(self) -> list[Row]:
        """The rows that are there; a line that a kill cut is left out, and so is its unit."""
        path = self.folder / "rows.jsonl"
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            # What is appended next must begin a line.
            with atomic_write(path) as file:
                file.write(whole)
        return [Row(*row) for line in whole.splitlines() for row in json.loads(line)]

    def current(self, rows: Sequence[Row], weights: Mapping[str, str]) -> list[Row]:
        """The rows but those of a checkpoint that was trained again: these are measured again.

        `weights` has the hash of each checkpoint by `place_of`, as far as it has one.
        """
        path = self.folder / "weights.json"
        before = {}
        if path.is_file():
            before = read_json(path)
        kept = []
        for row in rows:
            place = place_of(row.model, row.step)
            if before.get(place) == weights.get(place, before.get(place)):
                kept.append(row)
        if len(kept) < len(rows):
            with atomic_write(self.folder / "rows.jsonl") as file:
                file.writelines(json.dumps([row]) + "\n" for row in kept)
        write_json(path, {**before, **weights})
        return kept

    def add(self, rows: Sequence[Row]) -> None:
        """Append the rows of one key, as one line: all or none are read back."""
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows) + "\n")


def write_csv(path: Path, rows: Iterable[Row], counts: Frequencies) -> None:
    """Write rows with the published columns, then the operand's count before the checkpoint."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "x1", "count"])
        for row in rows:
            task = f"num_reasoning_arithmetic_{row.task}_{row.x1}"
            count = counts.get((row.model, row.step, row.x1), "")
            writer.writerow(
                [row.model, row.step, task, row.shots, row.right, row.stderr, row.x1, count]
            )


def read_published(path: str | Path) -> list[Row]:
    """The rows of a CSV file of the published study, or of `write_csv`; sizes by today's names.

    Raises  DataError if a column is missing or a line is not as expected.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    missing = [name for name in COLUMNS if not lines or name not in lines[0]]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    rows = []
    for number, line in enumerate(lines, 2):
        task = TASK.fullmatch(line["task"] or "")
        try:
            if task is None:
                raise ValueError(f"unknown task {line['task']!r}")
            rows.append(
                Row(
                    todays_name(line["model"]),
                    int(line["checkpoint"]),
                    task[1],
                    int(line["fewshot"]),
                    int(task[2]),
                    float(line["acc"]),
                    float(line["acc_stderr"]),
                )
            )
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: {error}") from None
    return rows


def todays_name(model: str) -> str:
    """A model's name without its owner, its size as Pythia calls it today."""
    name = model.rpartition("/")[2]
    for old, new in PUBLISHED_SIZES.items():
        name = re.sub(rf"(?<![\d.]){re.escape(old)}(?!\w)", new, name)
    return name


def read_counts(path: Path) -> dict[tuple[str, int, int], int]:
    """The `count` column of `write_csv` by model, step and operand; empty without one."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    found = {}
    for line in lines:
        if line.get("count") and line.get("x1"):
            place = (todays_name(line["model"]), int(line["checkpoint"]), int(line["x1"]))
            found[place] = int(line["count"])
    return found


def means(rows: Iterable[Row]) -> dict[Key, float]:
    """Mean accuracy over the operands."""
    values: dict[Key, list[float]] = {}
    for row in rows:
        values.setdefault(row.key, []).append(row.right)
    return {key: sum(own) / len(own) for key, own in values.items()}


MOST = 10
"""Operands at each end of the frequencies that the table compares; half of them if there are fewer
than twice as many."""


def gaps(rows: Iterable[Row], counts: Frequencies) -> dict[Key, float]:
    """Mean accuracy of the most frequent operands less that of the least frequent ones, in points
    of a hundred; where no operand has a count, nothing.

    Operands of one frequency are ordered by their size.
    """
    by_key: dict[Key, list[Row]] = {}
    for row in rows:
        if (row.model, row.step, row.x1) in counts:
            by_key.setdefault(row.key, []).append(row)
    found = {}
    for key, own in by_key.items():
        ordered = sorted(own, key=lambda row: (-counts[row.model, row.step, row.x1], row.x1))
        ends = min(MOST, len(ordered) // 2)
        if ends and counts[key.model, key.step, ordered[0].x1] > 0:
            often = sum(row.right for row in ordered[:ends]) / ends
            seldom = sum(row.right for row in ordered[-ends:]) / ends
            found[key] = 100 * (often - seldom)
    return found
