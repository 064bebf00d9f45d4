"""Line charts as inline SVG: axes, ticks, a legend and a title on hover, with no library and no script."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 46
COLOURS = 8
"""Series colours of the page's style sheet, `--c0` to `--c7`; further series begin again."""
LONGEST_LABEL = 18
"""Characters of a line's name that are drawn."""
LETTER = 8.0
"""Width of a bold letter of a name, in user units."""
LABEL_GAP = 15.0
"""Least distance of the labels at the ends of lines, in user units."""


class Series(NamedTuple):
    """One line: its name, (x, y) points by rising x, and whether it stays in the background without a label."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


class Axis(NamedTuple):
    """Maps values from `low` to `high` onto pixels from `start` to `end`; `log` spaces by log(1 + value)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log1p(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)


def nice_step(span: float, count: int) -> float:
    """The 1, 2 or 5 times a power of ten that cuts `span` into about `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(power * unit for unit in (1, 2, 5, 10) if power * unit >= raw * 0.999)


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values from `low` to `high`, both included when they are round."""
    step = nice_step((high - low) or 1.0, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(high: float) -> list[float]:
    """0, then powers of two up to a few thousand and powers of ten beyond."""
    base = 2 if high <= 4096 else 10
    return [
        0.0,
        *(float(base**i) for i in range(math.floor(math.log(max(high, 1), base) + 1e-9) + 1)),
    ]


def number(value: float) -> str:
    """A tick or point as short text: 1500000 -> 1.5M, 0.25 -> 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def label_room(series: Sequence[Series]) -> float:
    """Width beside the lines for their names; none for a single line, which the heading names."""
    names = [shorten(line.name) for line in series if not line.faint]
    return 6 + LETTER * max(map(len, names)) if len(names) > 1 else 0.0


def shorten(name: str) -> str:
    """A name that fits beside a line, without its middle: names of one kind differ at their ends."""
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[: half - 1]}…{name[-half:]}"


def bounds(series: Sequence[Series], log_x: bool) -> tuple[Axis, Axis]:
    """Axes that hold every point; y reaches from a round value below to a round value above."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    step = nice_step((max(ys) - min(ys)) or 1.0, 6)
    low, high = math.floor(min(ys) / step) * step, math.ceil(max(ys) / step) * step
    x_axis = Axis(
        0.0 if log_x else min(xs), max(xs), LEFT, WIDTH - RIGHT - label_room(series), log_x
    )
    return x_axis, Axis(low, high if high > low else low + step, HEIGHT - BOTTOM, TOP)


def draw_axes(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    """Grid, tick texts and the names of both axes."""
    parts = []
    for tick in linear_ticks(y_axis.low, y_axis.high, 8):
        y = y_axis(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{x_axis.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    ticks = log_ticks(x_axis.high) if x_axis.log else linear_ticks(x_axis.low, x_axis.high, 8)
    floor = y_axis.start
    for tick in ticks:
        x = x_axis(tick)
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(
        f'<line class="mark" x1="{LEFT}" x2="{x_axis.end:.1f}" y1="{floor}" y2="{floor}"/>'
    )
    middle = (LEFT + x_axis.end) / 2
    parts.append(
        f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="name" transform="translate(13 {(TOP + floor) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def draw_line(line: Series, colour: int, x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    """The polyline and, unless it is faint, a dot with a title for each point."""
    spots = [(x_axis(x), y_axis(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    kind = "line faint" if line.faint else "line"
    out = f'<polyline class="{kind}" style="stroke:var(--c{colour})" points="{path}"/>'
    if line.faint:
        return out
    small = " small" if len(spots) > 40 else ""
    dots = (
        f'<circle class="dot{small}" style="fill:var(--c{colour})" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
        f"<title>{escape(line.name)} · {escape(x_label)} {number(at)} · {value:.4g}</title></circle>"
        for (x, y), (at, value) in zip(spots, line.points, strict=True)
    )
    return out + "".join(dots)


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights apart to at least `gap`, in their order, within `low` to `high` when they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, i in zip([None, *order], order, strict=False):
        placed[i] = max(placed[i], low if before is None else placed[before] + gap)
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def draw_labels(series: Sequence[tuple[int, Series]], x_axis: Axis, y_axis: Axis) -> str:
    """Each line's name beside its end, in its colour."""
    ends = [y_axis(line.points[-1][1]) for _, line in series]
    heights = spread(ends, LABEL_GAP, TOP + 6, y_axis.start)
    return "".join(
        f'<text class="label" style="fill:var(--c{colour})" x="{x_axis.end + 9:.1f}" y="{y + 4:.1f}">'
        f"{escape(shorten(line.name))}</text>"
        for (colour, line), y in zip(series, heights, strict=True)
    )


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, title: str, log_x: bool = False
) -> str:
    """One `<svg>` with a line for each series that has points; an empty string if none has.

    A faint series takes the colour of the next that is not faint: raw values behind their mean. With two lines or
    more each is named at its right end. With `log_x` step 0 has a place, for the axis is log(1 + x).
    """
    shown = [Series(line.name, finite(line.points), line.faint) for line in series]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    x_axis, y_axis = bounds(shown, log_x)
    colours, colour = [], 0
    for line in shown:
        colours.append(colour % COLOURS)
        colour += not line.faint
    lines = "".join(
        draw_line(s, c, x_axis, y_axis, x_label) for c, s in zip(colours, shown, strict=True)
    )
    named = [(c, s) for c, s in zip(colours, shown, strict=True) if not s.faint]
    labels = draw_labels(named, x_axis, y_axis) if len(named) > 1 else ""
    keys = (
        "".join(f'<span style="color:var(--c{c})">{escape(s.name)}</span>' for c, s in named)
        if labels
        else ""
    )
    legend = f'<p class="legend">{keys}</p>' if keys else ""
    return (
        f'<div class="chart">{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{draw_axes(x_axis, y_axis, x_label, y_label)}{lines}{labels}</svg></div>"
    )


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
