"""Input and output of reading GPT-NeoX files: options, and the values, notes and problems they
give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from castalia.config.neox_keys import HONOURED


class Remark(NamedTuple):
    """A note or a problem; settled when an override sets `key`."""

    key: str
    text: str


@dataclass
class NeoxReading:
    """The meaning of GPT-NeoX files in Castalia's terms."""

    values: dict[str, Any] = field(default_factory=dict)
    """Nested values of a run's config."""
    origins: dict[str, str] = field(default_factory=dict)
    """GPT-NeoX name or dotted key here -> where it was written."""
    notes: list[Remark] = field(default_factory=list)
    """Decisions made on the user's behalf."""
    problems: list[Remark] = field(default_factory=list)
    """Reasons to refuse the run."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> options without effect."""
    refused: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Remedy -> (place, value) of options that change results and are not honoured."""


def note(out: NeoxReading, text: str, key: str = "") -> None:
    """Add a note."""
    out.notes.append(Remark(key, text))


def wrong(out: NeoxReading, text: str, key: str = "") -> None:
    """Add a problem."""
    out.problems.append(Remark(key, text))


@dataclass
class NeoxOptions:
    """GPT-NeoX options by name; an option that no file gives has GPT-NeoX's default."""

    given: dict[str, Any]
    origins: dict[str, str]
    world: int
    complete: bool

    def __getitem__(self, name: str) -> Any:
        if self.has(name):
            return self.given[name]
        return HONOURED[name].default

    def has(self, name: str) -> bool:
        """Whether a file gives it a value."""
        return self.given.get(name) is not None

    def drop(self, name: str) -> None:
        """Treat it as not given."""
        self.given.pop(name, None)

    def put(self, out: NeoxReading, path: str, value: Any, *names: str) -> None:
        """Set the dotted key `path`, which follows from the options `names`.

        Over a preset it is set only if a file gives one of them.
        """
        given = [name for name in names if self.has(name)]
        if not self.complete and not given:
            return
        *parents, last = path.split(".")
        place = out.values
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
        if given:
            out.origins[path] = self.origins[given[0]]


OptionRule = Callable[[NeoxOptions, NeoxReading], None]
"""Reads a group of options, and sets what they mean."""
