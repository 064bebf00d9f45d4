"""Bytes that were allocated, by part of a step, out of what torch's profiler recorded."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

MOST_POINTS = 2000
"""Points of the timeline that are kept: enough for a curve as wide as a screen."""


class Span(NamedTuple):
    """One call of a part."""

    begin: int
    """Nanoseconds."""
    end: int
    name: str


class Change(NamedTuple):
    """An allocation, or with negative bytes a release."""

    at: int
    """Nanoseconds."""
    bytes: int


class PartBytes(NamedTuple):
    """What all calls of one part did to the memory."""

    name: str
    calls: int
    allocated: int
    """Bytes allocated in the part itself, not in a part inside it."""
    released: int
    peak: int
    """Largest number of bytes alive in a call, above those at the start of the window."""


def by_part(spans: Iterable[Span], changes: Iterable[Change]) -> list[PartBytes]:
    """Bytes by part, the largest peak first; spans nest."""
    # At one moment: what ends, what begins, then the change, which belongs to what has begun.
    moments: list[tuple[int, int, Any]] = [(change.at, 2, change.bytes) for change in changes]
    for span in spans:
        moments += [(span.begin, 1, span.name), (span.end, 0, span.name)]
    moments.sort(key=lambda moment: moment[:2])
    now = 0
    open_parts: list[str] = []
    calls: dict[str, int] = {}
    own: dict[str, tuple[int, int]] = {}
    peaks: dict[str, int] = {}
    for _, kind, what in moments:
        if kind == 0 and what in open_parts:
            # From the end of the list: a part inside another of the same name ends first.
            del open_parts[len(open_parts) - 1 - open_parts[::-1].index(what)]
        elif kind == 1:
            open_parts.append(what)
            calls[what] = calls.get(what, 0) + 1
            peaks[what] = max(peaks.get(what, now), now)
        elif kind == 2:
            now += what
            for name in open_parts:
                peaks[name] = max(peaks[name], now)
            if open_parts:
                allocated, released = own.get(open_parts[-1], (0, 0))
                if what < 0:
                    released -= what
                else:
                    allocated += what
                own[open_parts[-1]] = (allocated, released)
    parts = []
    for name, peak in peaks.items():
        allocated, released = own.get(name, (0, 0))
        parts.append(PartBytes(name, calls[name], allocated, released, peak))
    return sorted(parts, key=lambda each: -each.peak)


def timeline(changes: Sequence[Change]) -> list[tuple[int, int]]:
    """(nanoseconds, bytes alive) since the first change; the peak of each stretch is kept."""
    if not changes:
        return []
    points = []
    now = 0
    for change in sorted(changes, key=lambda each: each.at):
        now += change.bytes
        points.append((change.at - changes[0].at, now))
    stride = -(-len(points) // MOST_POINTS)
    stretches = [points[n : n + stride] for n in range(0, len(points), stride)]
    return [max(stretch, key=lambda point: point[1]) for stretch in stretches]
