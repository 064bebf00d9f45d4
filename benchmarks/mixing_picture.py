"""The picture of the mixing benchmark: a dot for every seed of every arm, and learned shares."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

# In user units: height of an arm's line, width of the names, width of a panel, gap between
# panels, and room for the titles.
LINE = 22
LABEL = 128
PANEL = 236
GAP = 26
TOP = 58
COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6",
    "#9d755d", "#6b6ecf", "#8ca252", "#bd9e39", "#ad494a", "#a55194", "#393b79", "#7f7f7f",
)  # fmt: skip
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.s{font-size:10px;fill:#777}"
    ".g{stroke:#ddd}.z{stroke:#999;stroke-dasharray:3 3}.m{stroke:#222;stroke-width:2}"
)
Dots = dict[str, float]


def draw(value: dict[str, Any], path: Path) -> None:
    """Write the picture of a benchmark's JSON."""
    arms = sorted(value["arms"], key=lambda arm: value["arms"][arm]["metrics"]["M1"])
    fixed = value["best_fixed"]
    panels: list[tuple[str, Callable[[str], Dots], float | None, bool]] = [
        (
            "M1: mean loss, nats a byte",
            lambda arm: value["arms"][arm]["by_seed"]["M1"],
            None,
            False,
        ),
        (
            "M2: loss by tokens, nats a byte",
            lambda arm: value["arms"][arm]["by_seed"]["M2"],
            None,
            False,
        ),
        (
            f"iterations saved, M1, against {fixed['M1']}",
            lambda arm: saved(value, arm, "M1"),
            0.0,
            True,
        ),
        (
            f"iterations saved, M2, against {fixed['M2']}",
            lambda arm: saved(value, arm, "M2"),
            0.0,
            True,
        ),
    ]
    parts = [text(8, TOP + LINE * row + 4, arm) for row, arm in enumerate(arms)]
    height = TOP + LINE * len(arms)
    for place, (title, dots, line, percent) in enumerate(panels):
        left = LABEL + place * (PANEL + GAP)
        parts += panel(left, title, [dots(arm) for arm in arms], line, percent)
    moving = [arm for arm in ("odm", "progress", "progress-tilt") if arm in value["arms"]]
    for place, arm in enumerate(moving):
        parts += areas(
            LABEL + place * (PANEL + GAP), height + 40, arm, value["arms"][arm]["shares"]
        )
    parts += legend(LABEL + len(moving) * (PANEL + GAP), height + 40, list(value["sources"]))
    width = LABEL + len(panels) * (PANEL + GAP)
    total = height + 40 + max(190, 14 * len(value["sources"]) + 20)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img">'
    title = (
        f"{len(value['sources'])} sources, {value['scale']['steps']} steps;"
        " a dot is a seed, a bar the median"
    )
    page = f'<style>{STYLE}</style><rect width="{width}" height="{total}" fill="#fff"/>'
    body = "".join([page, text(8, 16, title, "t"), *parts])
    path.write_text(f"{head}<title>{escape(title)}</title>{body}</svg>\n", encoding="utf-8")


def saved(value: dict[str, Any], arm: str, metric: str) -> Dots:
    """Iterations saved by seed."""
    by_seed: Dots = value["arms"][arm]["against_best_fixed"][metric]["by_seed"]
    return by_seed


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words at a place, with an optional CSS class."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(words)}</text>'


def panel(
    left: float, title: str, rows: Sequence[Dots], line: float | None, percent: bool
) -> list[str]:
    """Dots of all arms on one axis."""
    values = [v for row in rows for v in row.values()]
    if line is not None:
        values.append(line)
    low = min(values)
    high = max(values)
    span = (high - low) or 1.0

    def at(v: float) -> float:
        return left + 6 + (v - low) / span * (PANEL - 12)

    parts = [text(left, 36, title, "t")]
    for tick in (low, (low + high) / 2, high):
        parts.append(text(at(tick) - 14, 50, f"{tick:+.0%}" if percent else f"{tick:.3f}", "s"))
    if line is not None:
        x = at(line)
        bottom = TOP + LINE * len(rows) - 10
        parts.append(f'<line class="z" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        y = TOP + LINE * number
        parts.append(f'<line class="g" x1="{left}" x2="{left + PANEL}" y1="{y}" y2="{y}"/>')
        middle = sorted(row.values())[len(row) // 2]
        parts.append(
            f'<line class="m" x1="{at(middle):.1f}" x2="{at(middle):.1f}"'
            f' y1="{y - 6}" y2="{y + 6}"/>'
        )
        for seed, v in row.items():
            parts.append(
                f'<circle cx="{at(v):.1f}" cy="{y}" r="3.5" fill="#4c78a8" fill-opacity=".75">'
                f"<title>seed {seed}: {v:.4f}</title></circle>"
            )
    return parts


def areas(left: float, top: float, arm: str, shares: Sequence[Sequence[float]]) -> list[str]:
    """The shares of an arm over the steps, as stacked areas."""
    high = 140.0
    last = shares[-1][0]
    parts = [text(left, top - 8, f"shares under {arm}", "t")]
    below = [0.0] * len(shares)
    for source in range(1, len(shares[0])):
        above = [b + line[source] for b, line in zip(below, shares, strict=True)]
        x = [left + line[0] / last * PANEL for line in shares]
        up = [f"{a:.1f},{top + high * (1 - b):.1f}" for a, b in zip(x, above, strict=True)]
        down = [f"{a:.1f},{top + high * (1 - b):.1f}" for a, b in zip(x, below, strict=True)]
        colour = COLOURS[(source - 1) % len(COLOURS)]
        parts.append(
            f'<polygon points="{" ".join(up + down[::-1])}" fill="{colour}" fill-opacity=".85"/>'
        )
        below = above
    parts.append(text(left, top + high + 14, f"step {shares[0][0]:.0f} to {last:.0f}", "s"))
    return parts


def legend(left: float, top: float, sources: Sequence[str]) -> list[str]:
    """The colours of the sources, topmost area first."""
    parts = []
    for place, (number, source) in enumerate(reversed(list(enumerate(sources)))):
        y = top + 14 * place
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{left}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(text(left + 16, y, source, "s"))
    return parts
