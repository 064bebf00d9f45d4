"""The page of a study: figures and tables in one file that fetches nothing."""

from collections.abc import Sequence
from pathlib import Path

from castalia.analysis.page_file import write_static_page

STYLE = """
.figures{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0}
.figures figure{margin:0;background:#fff;border:1px solid var(--edge);border-radius:10px;
padding:6px;flex:0 1 WIDTHpx;min-width:0}
.figures svg{display:block;width:100%;height:auto}
.numbers th{white-space:normal}
"""


def figures(pictures: Sequence[str]) -> str:
    """SVG pictures side by side, as far as the window is wide enough."""
    return f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in pictures)}</div>'


def write_study_page(
    output: Path, title: str, lead: str, body: str, *, tables: str, width: int
) -> None:
    """Write index.html in the folder of a study.

    tables  the files beside it that hold all numbers, for the footer.
    width   of a figure, in pixels.
    """
    footer = f"Written by castalia. All numbers stand in {tables} beside this page."
    style = STYLE.replace("WIDTH", str(width))
    write_static_page(output / "index.html", title, lead, body, footer, style)
