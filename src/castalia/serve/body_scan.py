"""Limits of a request's body, held before it is parsed.

A few bytes of JSON become hundreds in memory, and a parser of C lets nothing else of the process
run while it works. So values are counted in the bytes themselves, in slices.
"""

from dataclasses import dataclass

from castalia.core.errors import ConfigError

SLICE = 1 << 16
"""Bytes counted at a time; other threads run in between."""
BRACKETS = b"[]{}"
NO_BRACKETS = bytes(byte for byte in range(256) if byte not in BRACKETS)


@dataclass(frozen=True)
class ScanLimits:
    """The most that a body may hold, whatever its size."""

    values: int = 1 << 20
    """Numbers, strings, lists, objects and the rest: 256 prompts of 2,048 ids are half as many."""
    strings: int = 1 << 17
    """Strings, the names of fields among them."""
    containers: int = 1 << 14
    """Lists and objects."""
    depth: int = 100
    """Lists and objects inside one another."""


LIMITS = ScanLimits()


class BodyScan:
    """Counts the values of a body, slice by slice."""

    def __init__(self, limits: ScanLimits = LIMITS) -> None:
        self.limits = limits
        self.in_string = False
        self.escape = b""
        """A backslash at the end of the last slice, which belongs to the next byte."""
        self.values = 1
        self.quotes = 0
        self.containers = 0
        self.depth = 0

    def take(self, part: bytes) -> None:
        """Count the next bytes.

        Raises  ConfigError if they exceed a limit.
        """
        part = self.escape + part
        backslashes = len(part) - len(part.rstrip(b"\\"))
        # Pairs of backslashes are whole; an odd one escapes what follows.
        self.escape = b"\\" if backslashes % 2 else b""
        part = part[: len(part) - len(self.escape)]
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        self.count(self.outside(part))

    def outside(self, part: bytes) -> bytes:
        """The bytes that no string holds."""
        quotes = part.count(b'"')
        if not quotes:
            return b"" if self.in_string else part
        self.quotes += quotes
        require_at_most(self.quotes // 2, self.limits.strings, "strings")
        pieces = part.split(b'"')[int(self.in_string) :: 2]
        self.in_string ^= bool(quotes % 2)
        return b"".join(pieces)

    def count(self, outside: bytes) -> None:
        """Count what stands outside of strings."""
        opened = outside.count(b"[") + outside.count(b"{")
        self.containers += opened
        require_at_most(self.containers, self.limits.containers, "lists and objects")
        # An item follows each comma, and a first item may follow each bracket.
        self.values += outside.count(b",") + opened
        require_at_most(self.values, self.limits.values, "values")
        # Only after a container could be opened: a body of closing brackets alone is no JSON.
        for bracket in outside.translate(None, NO_BRACKETS)[: 2 * self.limits.containers + 2]:
            self.depth += 1 if bracket in b"[{" else -1
            require_at_most(self.depth, self.limits.depth, "lists and objects inside one another")


def require_few_values(body: bytes, limits: ScanLimits = LIMITS) -> None:
    """Raises  ConfigError if a body of JSON holds more than the limits say."""
    scan = BodyScan(limits)
    for start in range(0, len(body), SLICE):
        scan.take(body[start : start + SLICE])


def require_at_most(count: int, most: int, what: str) -> None:
    """Raises  ConfigError if a body has more than `most` of something."""
    if count > most:
        raise ConfigError(f"the body has more than {most:,} {what}; split the request")
