"""HTML fragments of a report page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

NONE = "–"
"""A cell without a value."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    """An HTML table.

    kind  "numbers" aligns cells right, "words" left, and "code" keeps spaces.
    """
    thead = ""
    if any(header):
        head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
        thead = f"<thead><tr>{head}</tr></thead>"
    lines: list[str] = []
    for row in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table class="{escape(kind)}">{thead}<tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )


def section(title: str, about: str, body: str) -> str:
    """A section: heading, a line of explanation, body."""
    lead = ""
    if about:
        lead = f'<p class="about">{escape(about)}</p>'
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def tiles(values: Mapping[str, Any]) -> str:
    """Key figures, each in a box; "" without any."""
    if not values:
        return ""
    boxes = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in values.items()
    )
    return f'<dl class="tiles">{boxes}</dl>'


def folded(summary: str, body: str) -> str:
    """A part that the reader opens."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
