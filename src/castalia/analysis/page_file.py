"""The page as one file: its style, its script, Plotly and the data, without anything to fetch."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from castalia.core.extras import require
from castalia.core.files import atomic_write

FOLDER = files("castalia.analysis") / "page"
"""Styles and scripts."""
STYLES = ("page.css", "scores.css")
SCORES = ("score_data.js", "score_charts.js", "score_tables.js", "score_controls.js", "scores.js")
"""The scripts that draw evaluations, where the data have some."""
SCRIPTS = ("base.js", "run_choice.js", *SCORES, "scaling.js", "page.js")
"""The scripts of every page, in their order: page.js starts the parts that registered before it."""


def write_page(
    path: Path,
    title: str,
    lead: str,
    body: str,
    data: Mapping[str, Any],
    *,
    styles: Sequence[str] = STYLES,
    scripts: Sequence[str] = SCRIPTS,
) -> None:
    """Write the page, atomically.

    Raises  ConfigError if Plotly is not installed; CastaliaError if the file cannot be written.
    """
    text = document(title, lead, body, data, styles=styles, scripts=scripts)
    with atomic_write(path) as file:
        file.write(text)


def document(
    title: str,
    lead: str,
    body: str,
    data: Mapping[str, Any],
    *,
    styles: Sequence[str] = STYLES,
    scripts: Sequence[str] = SCRIPTS,
    nonce: str = "",
) -> str:
    """The complete document.

    nonce  the word by which a server's Content-Security-Policy knows the page's own scripts.
    """
    # Asked each time, also where the script is kept: it may be missing.
    require("plotly.offline", "report", "a report page")
    style = "".join((FOLDER / name).read_text(encoding="utf-8") for name in styles)
    script = "".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)
    allowed = f' nonce="{escape(nonce)}"' if nonce else ""
    # In base64 nothing of a run can end the script element that holds it.
    texts = {
        "plotly": plotly_script(),
        "data": compressed(json.dumps(data, separators=(",", ":"))),
    }
    packed = "".join(
        f'<script type="text/plain" id="{name}">{text}</script>\n' for name, text in texts.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>"
        "<noscript><p>The charts need JavaScript; the tables below do not.</p></noscript>"
        f"{body}<footer>Written by castalia from the files of the runs and results."
        " Charts by Plotly.js (MIT).</footer></main>\n"
        f"{packed}<script{allowed}>{script}</script></body></html>\n"
    )


def write_static_page(
    path: Path, title: str, lead: str, body: str, footer: str, style: str = ""
) -> None:
    """Write a page without scripts, whose pictures are SVG in its body, atomically.

    style  CSS behind that of the report.
    Raises  CastaliaError if the file cannot be written.
    """
    style = (FOLDER / "page.css").read_text(encoding="utf-8") + style
    with atomic_write(path) as file:
        file.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
            f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>{body}"
            f"<footer>{escape(footer)}</footer></main></body></html>\n"
        )


@cache
def plotly_script() -> str:
    """Plotly, compressed: half a second, which a server of pages spends once."""
    plotly = require("plotly.offline", "report", "a report page")
    return compressed(plotly.get_plotlyjs())


def compressed(text: str) -> str:
    """Text as gzip in base64, which the browser unpacks: Plotly takes 2 MB in place of 4.8."""
    # mtime=0: the same run gives the same page, byte for byte.
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
