"""Files of JSON lines that another process appends to: only what grew is read."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from castalia.core.errors import DataError
from castalia.mixing.record import MixtureRecord, add_line, parse_header

TAIL = 256
"""Bytes before the place of reading that are compared, to see that the file has only grown."""


class GrowingFile:
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
        self.inode = -1
        self.tail = b""

    def update(self) -> None:
        """Take the lines that were appended since the last call.

        Raises  DataError as `take`: then nothing moves, and the lines are read again.
        """
        try:
            with open(self.path, "rb") as file:
                grown = self.grown(file)
        except FileNotFoundError:
            self.begin()
            return
        whole = grown[: grown.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        self.take(lines)
        self.offset += len(whole)
        self.count += len(lines)
        self.tail = (self.tail + whole)[-TAIL:]

    def grown(self, file: IO[bytes]) -> bytes:
        """What stands after the place of reading; all of a file that was written anew."""
        inode = os.fstat(file.fileno()).st_ino
        file.seek(self.offset - len(self.tail))
        if inode != self.inode or file.read(len(self.tail)) != self.tail:
            self.begin()
            self.inode = inode
            file.seek(0)
        return file.read()

    def take(self, lines: list[bytes]) -> None:
        """Parse lines; `self.count` lines stand before them.

        Raises  DataError if one is damaged.
        """
        raise NotImplementedError


class GrowingMetrics(GrowingFile):
    """metrics.jsonl: its objects by step; of two lines of one step, the later one counts."""

    def begin(self) -> None:
        """Forget what was read."""
        super().begin()
        self.records: list[dict[str, Any]] = []

    def take(self, lines: list[bytes]) -> None:
        """Add the objects of lines.

        Raises  DataError if one is not an object with a step.
        """
        fresh = [self.parsed(line, self.count + number) for number, line in enumerate(lines, 1)]
        last = self.records[-1]["step"] if self.records else -1
        if all(record["step"] > last for record in fresh[:1]) and ascend(fresh):
            self.records += fresh
            return
        # A run that went back writes steps again: rare, so that the whole may be sorted.
        steps = {each["step"]: each for each in [*self.records, *fresh]}
        self.records = [steps[step] for step in sorted(steps)]

    def parsed(self, line: bytes, number: int) -> dict[str, Any]:
        """The object of a line.

        Raises  DataError.
        """
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            shown = line[:80].decode("utf-8", "replace")
            raise DataError(
                f"{self.path} line {number}: expected an object with a step, got {shown}"
            )
        return record


def ascend(records: list[dict[str, Any]]) -> bool:
    """Whether the steps only grow."""
    return all(a["step"] < b["step"] for a, b in pairwise(records))


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
            try:
                if self.record is None:
                    self.record = MixtureRecord(parse_header(line.decode(), self.path))
                else:
                    add_line(self.record, json.loads(line))
            except (ValueError, KeyError, TypeError, StopIteration):
                raise DataError(
                    f"{self.path} line {number} is not a line of a mixture record"
                ) from None
