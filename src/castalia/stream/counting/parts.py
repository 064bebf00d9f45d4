"""Counts on disk: parts of neighbouring steps, each with prefix sums by step."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, read_json, write_json
from castalia.data.fingerprint import changed, of_training
from castalia.stream.counting.asked import Findings
from castalia.stream.counting.pieces import Pieces

VERSION = 1
PART_TOKENS = 1 << 22
"""Tokens of a part: about a second of work, which a kill loses at most."""
MOST_PARTS = 1024
"""Of a run: more would make a look-up slow."""


class StepCounts:
    """Counts by label and step, gathered over the blocks of a part."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.numbers: dict[str, int] = {}
        self.keys: list[NDArray[np.int64]] = []
        """Label and step of each count, as label << 32 | steps since the first."""
        self.counts: list[NDArray[np.int64]] = []
        self.tokens: dict[int, int] = {}
        """Tokens of the text of each step."""

    def add(self, findings: Findings, steps: NDArray[np.int64], pieces: Pieces) -> None:
        """Count what was found in the pieces of rows of these steps, (R,)."""
        lengths = np.diff(pieces.id_stops, prepend=0) - 1
        for step, length in zip(steps[pieces.row].tolist(), lengths.tolist(), strict=True):
            self.tokens[step] = self.tokens.get(step, 0) + length
        key = findings.label << 32 | (steps[findings.row] - self.first)
        distinct, counts = np.unique(key, return_counts=True)
        labels, number = np.unique(distinct >> 32, return_inverse=True)
        known = [
            self.numbers.setdefault(findings.labels[label], len(self.numbers))
            for label in labels.tolist()
        ]
        own = number
        if known:
            own = np.array(known, np.int64)[number]
        self.keys.append(own << 32 | distinct & 0xFFFFFFFF)
        self.counts.append(counts)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a part's file holds."""
        none = [np.empty(0, np.int64)]
        key, place = np.unique(np.concatenate(self.keys or none), return_inverse=True)
        counts = np.concatenate(self.counts or none)
        sums = np.bincount(place, counts, minlength=len(key)).astype(np.int64).cumsum()
        label = key >> 32
        ends = np.searchsorted(label, np.arange(len(self.numbers)), side="right")
        totals = sums
        if len(ends):
            totals = np.diff(sums[ends - 1], prepend=0)
        # Prefix sums begin anew with every label.
        before = np.repeat(
            np.concatenate(([0], sums[ends - 1]))[: len(ends)], np.diff(ends, prepend=0)
        )
        spelled = [name.encode("utf-8") for name in self.numbers]
        return {
            "names": np.frombuffer(b"".join(spelled), np.uint8),
            "name_ends": np.cumsum([len(name) for name in spelled], dtype=np.int64),
            "ends": ends,
            "steps": (key & 0xFFFFFFFF).astype(np.uint32),
            "sums": sums - before,
            "totals": totals,
            "text_steps": np.array(sorted(self.tokens), np.int64),
            "text_tokens": np.array([self.tokens[step] for step in sorted(self.tokens)], np.int64),
        }


class Part:
    """A part as it stands on disk: counts of steps `first` to `stop` - 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first, self.stop = range_of(path)
        try:
            with np.load(path) as file:
                self.arrays = {name: file[name] for name in file.files}
            names = self.arrays["names"].tobytes()
            ends = self.arrays["name_ends"].tolist()
            self.labels = [names[a:b].decode("utf-8") for a, b in pairwise([0, *ends])]
        # The archive has a checksum of every array.
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged counts ({error}); delete the file") from None

    def tokens_in(self, first: int, stop: int) -> int:
        """Tokens of the text of the part's steps among `first` to `stop` - 1."""
        steps = self.arrays["text_steps"]
        return int(self.arrays["text_tokens"][(steps >= first) & (steps < stop)].sum())

    def before(self, step: int) -> NDArray[np.int64]:
        """Count of each label in the part's steps before `step`, by its prefix sums."""
        if step >= self.stop:
            return self.arrays["totals"]
        ends = self.arrays["ends"]
        counts = np.zeros(len(ends), np.int64)
        if step <= self.first or not len(ends):
            return counts
        lengths = np.diff(ends, prepend=0)
        label = np.repeat(np.arange(len(ends)), lengths)
        key = label << 32 | self.arrays["steps"].astype(np.int64)
        wanted = np.arange(len(ends)) << 32 | (step - self.first)
        place = np.searchsorted(key, wanted)
        some = place > ends - lengths
        counts[some] = self.arrays["sums"][place[some] - 1]
        return counts


@dataclass(frozen=True)
class Store:
    """The parts of one count, in a folder."""

    folder: Path

    def begin(self, described: dict[str, Any], fingerprint: dict[str, Any], size: int) -> int:
        """Record what is counted, or check that it is what was counted before.

        Returns  the steps of a part: `size`, or what the folder began with.
        Raises  DataError if the data have changed since.
        """
        path = self.folder / "counts.json"
        if not path.is_file():
            counts = {"version": VERSION, "steps_of_part": size, "asked": described}
            write_json(path, {**counts, "fingerprint": fingerprint})
            return size
        facts = read_json(path)
        before = of_training(facts.get("fingerprint", {}))
        differences = changed(before, of_training(fingerprint))
        if differences:
            raise DataError(
                f"{self.folder}: counts of other data: {'; '.join(differences)}; put the data back,"
                " or delete the folder to count again"
            )
        # As it was begun: ranges that are asked for later meet at the same borders.
        return int(facts["steps_of_part"])

    def paths(self) -> list[Path]:
        """The files of the parts, by their first step."""
        return sorted(self.folder.glob("steps-*.npz"), key=range_of)

    def save(self, first: int, stop: int, counts: StepCounts) -> None:
        """Write a part, atomically."""
        arrays: dict[str, Any] = counts.arrays()
        with atomic_write(self.folder / f"steps-{first:09}-{stop:09}.npz", "wb") as file:
            np.savez(file, **arrays)

    def parts(self, first: int, stop: int) -> Iterator[Part]:
        """The parts that steps `first` to `stop` - 1 touch."""
        for path in self.paths():
            begin, end = range_of(path)
            if begin < stop and end > first:
                yield Part(path)


def missing_steps(
    counted: Iterable[tuple[int, int]], first: int, stop: int, size: int
) -> Iterator[tuple[int, int]]:
    """The ranges of steps, of `size` steps at most, that `first` to `stop` - 1 still need."""
    step = first
    for begin, end in [*counted, (stop, stop)]:
        while step < min(begin, stop):
            # Parts end at multiples of `size`, whatever range was asked for first.
            until = min(begin, stop, (step // size + 1) * size)
            yield step, until
            step = until
        step = max(step, end)


def range_of(path: Path) -> tuple[int, int]:
    """First step of a part, and one past its last."""
    _, first, stop = path.stem.split("-")
    return int(first), int(stop)


def steps_of_part(rows: int, width: int, steps: int) -> int:
    """Steps of a part: PART_TOKENS, or more where the run would have over MOST_PARTS of them."""
    return max(1, PART_TOKENS // max(1, rows * width), -(-steps // MOST_PARTS))
