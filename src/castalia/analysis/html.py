"""Pieces of a report page."""

from collections.abc import Sequence
from html import escape
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    """An HTML table. `kind` is numbers, set to the right; words, set to the left; or code, with its spaces kept."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    thead = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table class="{escape(kind)}">{thead}<tbody>{body}</tbody></table></div>'


def section(title: str, about: str, body: str) -> str:
    """A heading, a line that explains, and what follows."""
    lead = f'<p class="about">{escape(about)}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"
