"""What a name of GPT-NeoX means here: `Honoured` or `Refused`."""

from typing import Any, NamedTuple


class Honoured(NamedTuple):
    """An option that sets something here."""

    path: str
    """Dotted key here, for hints and as the place of a plain value."""
    kind: str
    """Kind of value that GPT-NeoX expects: int, number, bool, str, list, dict."""
    default: Any = None
    """GPT-NeoX's value for a file that does not name it."""
    plain: bool = False
    """The value is copied to `path`; otherwise a rule in neox_rules.py or neox_files.py reads
    it."""


class Refused(NamedTuple):
    """An option that changes results and does not exist here."""

    harmless: tuple[Any, ...]
    """Values that change nothing."""
    hint: str
    """What to do about it."""
