"""Pieces of a page: cells, tables, anchors."""

import re
from collections.abc import Iterable, Sequence

PUNCTUATION = re.compile(r"[^\w\- ]")


def code(text: str) -> str:
    """Text as code; empty text stays empty."""
    # Two backticks around nothing would be shown as they are.
    if text:
        return f"`{text}`"
    return ""


def cell(text: str) -> str:
    """The text of a cell: a bar would end it, in code as well."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, without the columns that are empty in every row."""
    filled = [list(row) for row in rows]
    kept = [place for place in range(len(titles)) if any(row[place] for row in filled)]
    lines = [
        f"| {' | '.join(titles[place] for place in kept)} |",
        f"|{'---|' * len(kept)}",
    ]
    for row in filled:
        lines.append(f"| {' | '.join(cell(row[place]) for place in kept)} |")
    return lines


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading: small letters, without punctuation."""
    return PUNCTUATION.sub("", heading.lower().replace("`", "")).strip().replace(" ", "-")


def counted(number: int, noun: str) -> str:
    """`1 option`, `2 options`."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}s"
