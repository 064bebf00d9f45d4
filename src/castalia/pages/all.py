"""Which pages are generated, and their writing."""

from collections.abc import Callable
from pathlib import Path

from castalia.core.errors import DataError
from castalia.pages.api import api_page
from castalia.pages.neox import neox_page
from castalia.pages.options import options_page

PAGES: dict[str, Callable[[], str]] = {
    "options.md": options_page,
    "gpt-neox-options.md": neox_page,
    "api.md": api_page,
}
"""Name of each generated page in docs/ -> its text."""


def write_pages(folder: Path) -> list[str]:
    """Write every page to the docs folder `folder`; the names of those that changed.

    The old text is not read into the new one: a page full of conflict marks is whole again.

    Raises  DataError if `folder` is not a docs folder.
    """
    if not (folder / "README.md").is_file():
        raise DataError(
            f"{folder} has no README.md: run this in a clone of the repository, or name its docs"
            " folder"
        )
    changed = []
    for name, text_of in PAGES.items():
        page = folder / name
        text = text_of()
        before = b""
        if page.exists():
            before = page.read_bytes()
        if before != text.encode():
            page.write_text(text, encoding="utf-8", newline="\n")
            changed.append(name)
    return changed
