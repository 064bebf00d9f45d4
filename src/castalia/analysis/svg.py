"""Line charts as inline SVG, without a library or a script.

They have axes, ticks, labels, a legend for narrow screens, and titles on hover.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 760
HEIGHT = 360
# Margins around the plot, in user units: room for ticks and for the names of the axes.
LEFT = 56
RIGHT = 16
TOP = 14
BOTTOM = 46
COLOURS = 8
"""Number of series colours in the style sheet, `--c0` to `--c7`; they repeat."""
LONGEST_LABEL = 18
"""Characters of a line's name that are drawn."""
LETTER = 8.0
"""Width of a bold letter of a name, in user units."""
LABEL_GAP = 15.0
"""Smallest distance between labels at the ends of lines, in user units."""


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y) by increasing x."""
    faint: bool = False
    """Whether it is drawn in the background, without a label."""


class Axis(NamedTuple):
    """Maps values from `low` to `high` onto user units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    """Space by log(1 + value), which gives step 0 a place."""

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high, at = (self.scaled(v) for v in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def scaled(self, value: float) -> float:
        """The value, or log(1 + value) on a logarithmic axis."""
        return math.log1p(value) if self.log else value


def nice_step(span: float, count: int) -> float:
    """The 1, 2 or 5 times a power of ten that divides `span` into about `count` parts."""
    raw = span / max(count, 1)
    power = 1.0
    if raw > 0:
        power = 10.0 ** math.floor(math.log10(raw))
    # 0.999 forgives rounding in the division.
    return next(power * unit for unit in (1, 2, 5, 10) if power * unit >= raw * 0.999)


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values from `low` to `high`, including the ends if they are round."""
    step = nice_step((high - low) or 1.0, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(high: float) -> list[float]:
    """0, then powers of two if `high` is at most 4096, else powers of ten."""
    base = 2 if high <= 4096 else 10
    last = math.floor(math.log(max(high, 1), base) + 1e-9)
    return [0.0, *(float(base**i) for i in range(last + 1))]


def number(value: float) -> str:
    """A number as short text: 1500000 -> 1.5M, 0.25 -> 0.25. Up to 9999 is written out."""
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.4g}G"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def label_room(series: Sequence[Series]) -> float:
    """Width of the labels beside the lines; 0 for a single line, which the heading names."""
    names = [shorten(line.name) for line in series if not line.faint]
    if len(names) <= 1:
        return 0.0
    return 6 + LETTER * max(map(len, names))


def shorten(name: str) -> str:
    """A name that fits beside a line.

    The middle is cut out, because names of one kind differ at their ends.
    """
    if len(name) <= LONGEST_LABEL:
        return name
    half = LONGEST_LABEL // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def bounds(series: Sequence[Series], log_x: bool) -> tuple[Axis, Axis]:
    """Axes that contain every point; y runs between round values."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    step = nice_step((max(ys) - min(ys)) or 1.0, 6)
    low = math.floor(min(ys) / step) * step
    high = math.ceil(max(ys) / step) * step
    if high <= low:
        high = low + step
    left = 0.0 if log_x else min(xs)
    x_axis = Axis(left, max(xs), LEFT, WIDTH - RIGHT - label_room(series), log_x)
    return x_axis, Axis(low, high, HEIGHT - BOTTOM, TOP)


def draw_axes(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    """The grid, the ticks and the names of both axes."""
    floor = y_axis.start
    end = x_axis.end
    parts: list[str] = []
    for tick in linear_ticks(y_axis.low, y_axis.high, 8):
        y = y_axis(tick)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">',
            f"{number(tick)}</text>",
        ]
    if x_axis.log:
        ticks = log_ticks(x_axis.high)
    else:
        ticks = linear_ticks(x_axis.low, x_axis.high, 8)
    for tick in ticks:
        x = x_axis(tick)
        parts += [
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>',
            f'<text class="tick" x="{x:.1f}" y="{floor + 19}" text-anchor="middle">',
            f"{number(tick)}</text>",
        ]
    middle = (LEFT + end) / 2
    parts += [
        f'<line class="mark" x1="{LEFT}" x2="{end:.1f}" y1="{floor}" y2="{floor}"/>',
        f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">',
        f"{escape(x_label)}</text>",
        f'<text class="name" transform="translate(13 {(TOP + floor) / 2:.0f}) rotate(-90)"',
        f' text-anchor="middle">{escape(y_label)}</text>',
    ]
    return "".join(parts)


def draw_line(line: Series, colour: int, x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    """The polyline and, unless it is faint, a dot with a title for each point."""
    spots = [(x_axis(x), y_axis(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    style = f'style="stroke:var(--c{colour})" points="{path}"'
    if line.faint:
        return f'<polyline class="line faint" {style}/>'
    # Many dots would hide the line, so these show only under the pointer.
    small = " small" if len(spots) > 40 else ""
    parts = [f'<polyline class="line" {style}/>']
    for (x, y), (at, value) in zip(spots, line.points, strict=True):
        title = f"{escape(line.name)} · {escape(x_label)} {number(at)} · {value:.4g}"
        parts.append(
            f'<circle class="dot{small}" style="fill:var(--c{colour})" cx="{x:.1f}" cy="{y:.1f}"'
            f' r="3.2"><title>{title}</title></circle>'
        )
    return "".join(parts)


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights at least `gap` apart in their order, within `low` to `high` if they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    # Then back down from the top, which the first pass may have left.
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def draw_labels(series: Sequence[tuple[int, Series]], x_axis: Axis, y_axis: Axis) -> str:
    """Each line's name beside its end, in its colour; `series` pairs colours with lines."""
    ends = [y_axis(line.points[-1][1]) for _, line in series]
    heights = spread(ends, LABEL_GAP, TOP + 6, y_axis.start)
    parts: list[str] = []
    for (colour, line), y in zip(series, heights, strict=True):
        parts.append(
            f'<text class="label" style="fill:var(--c{colour})" x="{x_axis.end + 9:.1f}"'
            f' y="{y + 4:.1f}">{escape(shorten(line.name))}</text>'
        )
    return "".join(parts)


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, title: str, log_x: bool = False
) -> str:
    """One `<svg>` with a line for each series that has points; empty if none has.

    A faint series takes the colour of the next series that is not faint: raw values behind their
    mean. Two or more lines are named at their right ends. With `log_x` the x axis is log(1 + x).
    """
    finite = [Series(line.name, finite_points(line.points), line.faint) for line in series]
    shown = [line for line in finite if line.points]
    if not shown:
        return ""
    x_axis, y_axis = bounds(shown, log_x)
    coloured: list[tuple[int, Series]] = []
    colour = 0
    for line in shown:
        coloured.append((colour % COLOURS, line))
        if not line.faint:
            colour += 1
    body = draw_axes(x_axis, y_axis, x_label, y_label)
    for colour, line in coloured:
        body += draw_line(line, colour, x_axis, y_axis, x_label)

    named = [(colour, line) for colour, line in coloured if not line.faint]
    if len(named) <= 1:
        return svg_box(body, HEIGHT, title)
    body += draw_labels(named, x_axis, y_axis)
    return svg_box(body, HEIGHT, title, legend([(colour, line.name) for colour, line in named]))


def legend(colours: Sequence[tuple[int, str]]) -> str:
    """Names in their colours, for screens too narrow for labels."""
    keys = "".join(
        f'<span style="color:var(--c{colour})">{escape(name)}</span>' for colour, name in colours
    )
    return f'<p class="legend">{keys}</p>'


def svg_box(body: str, height: float, title: str, legend: str = "") -> str:
    """The `<svg>` of a chart in its box."""
    return (
        f'<div class="chart">{legend}<svg viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(title)}">{body}</svg></div>'
    )


def finite_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points without NaN and infinity."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
