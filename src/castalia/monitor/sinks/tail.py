"""The steps of metrics.jsonl as they are appended, for the sinks that follow it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from castalia.core.log_lines import CHANGED, Links
from castalia.monitor.sinks.jsonl import object_of


class Tail:
    """Reads a metrics.jsonl forward, also while it grows and after it was written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None

    def after(self, step: int) -> Iterator[dict[str, Any]]:
        """The objects of the steps after `step` that stand there now, in order.

        A damaged line is left out: the run itself tells of it when it resumes.
        """
        file = self.opened()
        while file is not None:
            place = file.tell()
            line = file.readline()
            if not line.endswith(b"\n"):
                # The end, or a line that is half written.
                file.seek(place)
                return
            record = record_of(line)
            if record is not None and record["step"] > step:
                step = record["step"]
                behind = file.tell()
                # While the caller is at work: should it fail, reading goes on with this line.
                file.seek(place)
                yield record
                file.seek(behind)

    def opened(self) -> IO[bytes] | None:
        """The file at the place where reading ended; None if there is none."""
        try:
            now = os.stat(self.path)
        except OSError:
            return None
        if self.file is not None:
            then = os.fstat(self.file.fileno())
            # A rollback and a resume replace the file.
            if then.st_ino == now.st_ino and now.st_size >= self.file.tell():
                return self.file
            self.file.close()
        self.file = open(self.path, "rb")  # noqa: SIM115
        return self.file

    def rewind(self) -> None:
        """Read from the first line again."""
        if self.file is not None:
            self.file.close()
            self.file = None

    close = rewind


def record_of(raw: bytes) -> dict[str, Any] | None:
    """The object of a line that has a step; None for any other, and for a damaged one."""
    line = Links().take(raw.removesuffix(b"\n"))
    return None if line.fault == CHANGED else object_of(line)
