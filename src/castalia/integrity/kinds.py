"""Kinds of folders that can be checked, as data: each room's format is known to its own module."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

OnBytes = Callable[[int], object]
"""Called with the number of bytes that were just read."""


class CheckedFile(NamedTuple):
    """One file, and what is known about it."""

    path: str
    fault: str | None = None
    """Why it is not the file that was written, one sentence; None if nothing speaks against it."""
    by: str = ""
    """What vouches for its content, such as `SHA-256 in manifest.json`; empty if nothing does."""
    size: int = 0
    """Bytes."""


class FolderKind(NamedTuple):
    """One kind of folder."""

    name: str
    """A word for people."""
    recognizes: Callable[[Path], bool]
    """Whether a path, folder or file, is of this kind. Opens little."""
    check: Callable[[Path], Iterator[CheckedFile]]
    """Every file of the folder in turn; goes on after a fault."""
    whole: bool = True
    """Whether all that lies in the folder belongs to it. A run holds other folders, too."""


def unlisted(path: Path) -> CheckedFile:
    """A file that no record speaks of."""
    return CheckedFile(str(path), size=path.stat().st_size)
