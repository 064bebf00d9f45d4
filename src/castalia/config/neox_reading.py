"""What a reading of GPT-NeoX files works on and what it gives: options in, values, notes and problems out."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from castalia.config.neox_keys import HONOURED


class Remark(NamedTuple):
    """A note or a problem; settled when an override sets `key`."""

    key: str
    text: str


@dataclass
class Reading:
    """What GPT-NeoX files say, in our terms."""

    values: dict[str, Any] = field(default_factory=dict)
    """Nested values of our config."""
    origins: dict[str, str] = field(default_factory=dict)
    """GPT-NeoX name, and our dotted key, -> where it was written."""
    notes: list[Remark] = field(default_factory=list)
    """What was decided on the user's behalf."""
    problems: list[Remark] = field(default_factory=list)
    """What stops the run."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> options that have no effect."""
    refused: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Remedy -> (where, value) of options that change results and are not honoured."""


def note(out: Reading, text: str, key: str = "") -> None:
    """Add a note."""
    out.notes.append(Remark(key, text))


def wrong(out: Reading, text: str, key: str = "") -> None:
    """Add a problem."""
    out.problems.append(Remark(key, text))


@dataclass
class Options:
    """GPT-NeoX options by name; one that no file gives has GPT-NeoX's default."""

    given: dict[str, Any]
    origins: dict[str, str]
    world: int
    complete: bool

    def __getitem__(self, name: str) -> Any:
        return self.given[name] if self.has(name) else HONOURED[name].default

    def has(self, name: str) -> bool:
        """Whether a file gives it a value."""
        return self.given.get(name) is not None

    def drop(self, name: str) -> None:
        """Treat it as not given."""
        self.given.pop(name, None)

    def put(self, out: Reading, path: str, value: Any, *names: str) -> None:
        """Set our dotted key `path`, which comes from the options `names`; over a preset only if one is given."""
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
