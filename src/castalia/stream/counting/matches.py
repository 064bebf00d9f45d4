"""Matches of a pattern in the text of rows, with a time limit."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.stream.counting.pieces import Pieces

ROW_SECONDS = 10.0
"""Time for one row's text; a good pattern needs milliseconds."""


class Match(NamedTuple):
    """A match in the text of a piece."""

    label: str
    start: int
    """Its first character; that of group 1 if the pattern has one."""
    stop: int


class SlowRowError(Exception):
    """A row's text took longer than the limit; `row` is its number in the block."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


class Pattern:
    """A regular expression over the pieces of rows, counted by the text of group 1 or of the match.

    Matches do not overlap, but a look-ahead such as `(?=( \\d+ \\w+ \\d+))` finds one at every
    place. With `ignore_case` matched text is in lower case.
    Raises  ConfigError if it does not compile, saying where.
    """

    def __init__(self, pattern: str, ignore_case: bool, seconds: float) -> None:
        # The library re cannot be stopped within a row.
        library = require("regex", "count", "--regex")
        try:
            flags = 0
            if ignore_case:
                flags = library.I
            self.pattern: Any = library.compile(pattern, flags)
        except library.error as error:
            where = " at its end"
            if error.pos is not None and error.pos < len(pattern):
                where = f" at character {error.pos}, before {pattern[error.pos :]!r}"
            raise ConfigError(f"--regex {pattern!r}: {error.msg}{where}") from None
        if not pattern:
            raise ConfigError("--regex '': an empty pattern matches everywhere; write one")
        self.group = 0
        if self.pattern.groups:
            self.group = 1
        self.ignore_case = ignore_case
        self.seconds = seconds

    def in_pieces(self, pieces: Pieces) -> Iterator[tuple[int, str, list[Match]]]:
        """Row, text and matches of each piece.

        Raises  SlowRowError if a piece takes longer than the limit.
        """
        for row, text in pieces.texts():
            yield row, text, list(self.matches(row, text))

    def matches(self, row: int, text: str) -> Iterator[Match]:
        """The matches in the text of a piece."""
        try:
            for match in self.pattern.finditer(text, timeout=self.seconds):
                # A group that took no part in the match says nothing about it.
                group = self.group
                if match[group] is None:
                    group = 0
                label = match[group]
                if self.ignore_case:
                    label = label.lower()
                yield Match(label, *match.span(group))
        except TimeoutError:
            raise SlowRowError(row) from None
