"""Files of JSON lines that another process appends to: only what grew is read."""

import json
import os
import warnings
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from castalia.analysis.runs import Columns, lines_by_step
from castalia.core.errors import DataError
from castalia.core.log_lines import text_of
from castalia.mixing.record import MixtureRecord, add_line, parse_header

TAIL = 256
"""Bytes before the place of reading that are compared, to see that the file has only grown."""
PIECE = 1 << 23
"""Bytes that are read at a time."""


class GrowingFile(ABC):
    """The lines of a file, each given out once.

    A last line without its line break is one that is being written: it is read the next time. A
    file that was written anew, as a resume does, is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin()

    def begin(self) -> None:
        """Forget what was read."""
        self.offset = 0
        self.count = 0
        """Lines read."""
        self.covered = 0
        """Bytes from the beginning whose lines were taken already, whatever `offset` says."""
        self.inode = -1
        self.tail = b""

    def update(self) -> None:
        """Take the lines that were appended since the last call.

        Raises  DataError as `take`: the lines from there on are read again the next time.
        """
        try:
            with open(self.path, "rb") as file:
                self.find_place(file)
                rest = b""
                # In pieces: the objects of a whole long file at once would be gigabytes.
                while piece := file.read(PIECE):
                    whole, _, rest = (rest + piece).rpartition(b"\n")
                    if whole:
                        self.move_over(whole + b"\n")
        except FileNotFoundError:
            self.begin()

    def find_place(self, file: IO[bytes]) -> None:
        """Go to the place of reading; to the beginning of a file that was written anew."""
        inode = os.fstat(file.fileno()).st_ino
        file.seek(self.offset - len(self.tail))
        if inode != self.inode or file.read(len(self.tail)) != self.tail:
            self.begin()
            self.inode = inode
            file.seek(0)

    def move_over(self, whole: bytes) -> None:
        """Take whole lines, then count them as read."""
        lines = whole.split(b"\n")[:-1]
        if self.offset + len(whole) > self.covered:
            self.take(lines)
        self.offset += len(whole)
        self.count += len(lines)
        self.tail = (self.tail + whole)[-TAIL:]

    @abstractmethod
    def take(self, lines: list[bytes]) -> None:
        """Parse lines; `self.count` lines stand before them.

        Raises  DataError if one is damaged.
        """


class GrowingMetrics(GrowingFile):
    """metrics.jsonl: its numbers, and what else stands in its lines, by step.

    Of two lines of one step, the later one counts.
    """

    def begin(self) -> None:
        """Forget what was read."""
        super().begin()
        self.records: list[dict[str, Any]] = []
        """Without the objects inside of lines, such as those by source: `columns` has them."""
        self.columns = Columns()

    def take(self, lines: list[bytes]) -> None:
        """Add the objects of lines.

        Raises  DataError if one is not an object with a step.
        """
        parsed = (self.parsed(line, self.count + number) for number, line in enumerate(lines, 1))
        fresh = [record for record in parsed if record is not None]
        last = self.records[-1:] + fresh
        if not all(a["step"] < b["step"] for a, b in pairwise(last)):
            # Training writes a file anew before it goes back, so that this is rare.
            self.covered = self.path.stat().st_size
            fresh = lines_by_step(self.path)
            self.records = []
            self.columns = Columns()
        self.columns.add(fresh)
        self.records += [flat(record) for record in fresh]

    def parsed(self, line: bytes, number: int) -> dict[str, Any] | None:
        """The object of a line; None, with a warning, if it was changed after it was written.

        Raises  DataError.
        """
        text = text_of(line)
        if text is None:
            warnings.warn(f"{self.path} line {number} is damaged; it is left out", stacklevel=2)
            return None
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            shown = line[:80].decode("utf-8", "replace")
            raise DataError(
                f"{self.path} line {number}: expected an object with a step, got {shown}"
            )
        return record


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A line without the objects in it, which are most of a run with many sources."""
    return {key: value for key, value in record.items() if not isinstance(value, dict)}


class GrowingMixture(GrowingFile):
    """mixture.jsonl as a record; None before its header."""

    def begin(self) -> None:
        """Forget what was read."""
        super().begin()
        self.record: MixtureRecord | None = None

    def take(self, lines: list[bytes]) -> None:
        """Add lines to the record.

        Raises  DataError if one is damaged.
        """
        for number, line in enumerate(lines, self.count + 1):
            text = text_of(line)
            if text is None:
                warnings.warn(f"{self.path} line {number} is damaged; it is left out", stacklevel=2)
                continue
            try:
                if self.record is None:
                    self.record = MixtureRecord(parse_header(text, self.path))
                else:
                    add_line(self.record, json.loads(text))
            except (ValueError, KeyError, TypeError, StopIteration):
                raise DataError(
                    f"{self.path} line {number} is not a line of a mixture record"
                ) from None
