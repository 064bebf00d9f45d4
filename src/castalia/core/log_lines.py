"""Append-only logs of JSON lines, each of which vouches for itself and for the line before it.

A line ends with `"crc32": "BEFORE-OWN"`: OWN is the CRC-32 of everything that stands before it in
the line, BEFORE is the OWN of the line before. A flipped bit shows in its own line, wherever
reading begins; lines that are missing, doubled or moved show in the line behind them. Lines of
older versions have no checksum; the first line with one vouches for all bytes before it.
"""

import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from castalia.core.files import atomic_write, cannot_write, on_disk

KEY = "crc32"
LINK = re.compile(rb', "crc32": "([0-9a-f]{8})-([0-9a-f]{8})"\}\Z')
"""The end of a line that has a checksum."""
CHANGED = "its checksum is not that of its content: it was changed after it was written"
BROKEN = (
    "the line that it was written behind does not stand before it: lines are missing, doubled,"
    " changed or moved"
)
UNLINKED = "it has no checksum, which the lines before it have"


class LogLine(NamedTuple):
    """A line as it was read."""

    number: int
    """From 1."""
    text: bytes
    """Its JSON object, without the checksum."""
    fault: str | None
    """CHANGED, BROKEN or UNLINKED; None if the line stands as it was written, or is not covered."""
    is_covered: bool
    """Whether it has a checksum."""


class Links:
    """Follows a log from line to line; see the top of the file."""

    def __init__(self) -> None:
        self.number = 0
        self.own = 0
        """What a line that is appended now has as BEFORE."""
        self.expected: set[int] | None = {0}
        """What the next line may have as BEFORE; None if that is not known."""
        self.has_links = False

    def take(self, raw: bytes) -> LogLine:
        """Check the next line, which comes without its line break."""
        self.number += 1
        found = LINK.search(raw)
        if found is None:
            return self.take_plain(raw)
        before = int(found[1], 16)
        stated = int(found[2], 16)
        computed = zlib.crc32(raw[: found.start(2)])
        fault = None
        if computed != stated:
            fault = CHANGED
        elif self.expected is not None and before not in self.expected:
            fault = BROKEN
        # In a line that was changed, the flip may lie in what it states or in all else.
        self.expected = {stated, computed}
        self.own = stated
        self.has_links = True
        return LogLine(self.number, raw[: found.start()] + b"}", fault, True)

    def take_plain(self, raw: bytes) -> LogLine:
        """A line without a checksum: of an older version, or damaged just there."""
        if self.has_links:
            self.expected = None
            return LogLine(self.number, raw, UNLINKED, False)
        # All of them at once: the first line with a checksum vouches for them.
        self.own = zlib.crc32(raw + b"\n", self.own)
        self.expected = {self.own}
        return LogLine(self.number, raw, None, False)


def read_log(path: str | Path) -> Iterator[LogLine]:
    """The lines of a log, checked; a last line cut off by a crash is left out.

    Raises  OSError.
    """
    links = Links()
    with open(path, "rb") as file:
        for raw in whole_lines(file):
            yield links.take(raw.removesuffix(b"\n"))


def whole_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of an open file; the last one without its line break only if nothing else of it is
    missing, as other programs write files."""
    for raw in file:
        if raw.endswith(b"\n") or is_whole(raw):
            yield raw


def is_whole(raw: bytes) -> bool:
    """Whether a line is a whole object."""
    text = text_of(raw)
    if text is None:
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def text_of(raw: bytes) -> bytes | None:
    """The JSON object of a line without its checksum, wherever reading began; None if the line was
    changed after it was written."""
    line = Links().take(raw)
    return None if line.fault == CHANGED else line.text


def linked(text: bytes, before: int) -> tuple[bytes, int]:
    """A line, without its line break, for the JSON object `text` behind a line whose own CRC-32 is
    `before`; and its own CRC-32."""
    head = b'%s, "%s": "%08x-' % (text[:-1], KEY.encode(), before)
    own = zlib.crc32(head)
    return head + b'%08x"}' % own, own


def write_log(path: str | Path, texts: Iterable[bytes]) -> None:
    """Write a log anew from the JSON objects of its lines, atomically.

    Raises  CastaliaError if it cannot be written.
    """
    own = 0
    with atomic_write(path, "wb") as file:
        for text in texts:
            line, own = linked(text, own)
            file.write(line + b"\n")


class LineLog:
    """Appends lines to a log, each flushed at once; `sync` is for the moments that rely on them.

    path    the file; `open` makes it, or continues it behind its last whole line.
    copied  bytes of the newest lines that are kept in memory, for a copy elsewhere.
    """

    def __init__(self, path: str | Path, *, copied: int = 0) -> None:
        self.path = Path(path)
        self.copied = copied
        self.lines = 0
        self.step = 0
        """The step of the last line; 0 if it has none."""
        self.own = 0
        self.recent: deque[bytes] = deque()
        """The newest lines, with their checksums and line breaks."""
        self.recent_bytes = 0
        self.file: IO[bytes] | None = None

    def open(self) -> None:
        """Begin the log, or continue it: a last line that a crash cut off is removed.

        Raises  CastaliaError if it cannot be written.
        """
        self.close()
        links = Links()
        self.recent.clear()
        self.recent_bytes = 0
        whole = 0
        last = b"{}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b")  # noqa: SIM115
            self.file.seek(0)
            ends = True
            for raw in whole_lines(self.file):
                line = raw.removesuffix(b"\n")
                last = links.take(line).text
                self.keep(line + b"\n")
                whole += len(raw)
                ends = raw.endswith(b"\n")
            self.file.truncate(whole)
            if not ends:
                self.file.write(b"\n")
                self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.lines = links.number
        self.own = links.own
        self.step = step_of(last) or 0

    def append(self, text: str, step: int = 0) -> None:
        """Append the JSON object `text`, which is not empty, about a step.

        Raises  CastaliaError if it cannot be written.
        """
        assert self.file is not None, "open() comes first"
        line, self.own = linked(text.encode(), self.own)
        line += b"\n"
        try:
            self.file.write(line)
            # Flushed at each line: a killed run loses none that it had reported.
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.lines += 1
        self.step = step
        self.keep(line)

    def keep(self, line: bytes) -> None:
        """Keep a line for a copy, instead of the oldest ones."""
        if not self.copied:
            return
        self.recent.append(line)
        self.recent_bytes += len(line)
        while self.recent_bytes > self.copied:
            self.recent_bytes -= len(self.recent.popleft())

    def copy(self) -> str:
        """The newest lines."""
        return b"".join(self.recent).decode()

    def sync(self) -> None:
        """Force what was appended to the disk. Safe beside `append` in another thread.

        Raises  CastaliaError if the disk does not take it.
        """
        try:
            on_disk(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Force the lines to the disk and close the file."""
        if self.file is None:
            return
        file = self.file
        self.file = None
        try:
            with file:
                file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.sync()


def step_of(text: bytes) -> int | None:
    """The step of a line; None if it has none, or is not JSON."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None
