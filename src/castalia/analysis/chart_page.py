"""Pages of small charts that work offline: as many beside each other as the screen is wide."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from castalia.analysis.tuning.chart import Panel, one_panel, stroke
from castalia.core.files import atomic_write

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#222;background:#fff}
main{max-width:1120px;margin:auto;padding:16px}h1{font-size:1.5rem;margin:.4em 0}
h2{font-size:1.2rem;border-top:1px solid #ddd;padding-top:1em;margin-top:1.5em}.about{color:#555}
"""
CHARTS = """
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:12px}
figure{margin:0;background:#fff}figure svg{width:100%;height:auto;max-width:420px}
.keys span{white-space:nowrap}.keys svg{width:22px;height:8px;margin-right:5px}
.keys{display:flex;flex-wrap:wrap;gap:4px 16px;margin:.6em 0}
"""
"""CSS of `charts`, for any page; figures are dark on white whatever the page is."""


def write_chart_page(output: str | Path, title: str, about: str, body: str) -> Path:
    """Write a page of sections.

    Raises  CastaliaError if it cannot be written.
    """
    path = Path(output)
    with atomic_write(path) as file:
        file.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}{CHARTS}</style></head><body><main>"
            f"<h1>{title}</h1><p>{escape(about)}</p>{body}</main></body></html>\n"
        )
    return path


def charts(panels: Sequence[Panel], names: Sequence[str]) -> str:
    """Charts beside each other, as many as the screen is wide, under one legend."""
    colors = {name: stroke(place) for place, name in enumerate(names)}
    keys = "".join(
        f'<span><svg viewBox="0 0 22 8"><path d="M1 4h20" stroke-width="3" {color}/></svg>'
        f"{escape(name)}</span>"
        for name, color in colors.items()
    )
    figures = "".join(f"<figure>{one_panel(panel, colors)}</figure>" for panel in panels)
    return f'<div class="keys">{keys}</div><div class="charts">{figures}</div>'
