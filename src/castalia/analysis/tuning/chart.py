"""Line charts as SVG, drawn without a library: panels side by side with logarithmic axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from castalia.core.errors import ConfigError
from castalia.core.files import cannot_write

WIDTH = 340
HEIGHT = 250
LEFT = 62
RIGHT = 14
TOP = 30
BOTTOM = 42
LEGEND = 18
"""Height of a line of the legend."""
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b"),
    *("#2c2c9a", "#a6761d"),
)
"""Colors that differ also for color-blind readers; Okabe and Ito 2008, and two more."""

Points = Sequence[tuple[float, float]]


class Mark(NamedTuple):
    """A vertical line with a word at its top."""

    at: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One chart: lines by name over two axes, each with a logarithmic scale or a linear one."""

    title: str
    lines: Mapping[str, Points]
    across: str
    """What the axis at the bottom is."""
    up: str = ""
    log_x: bool = True
    log_y: bool = True
    marks: Sequence[Mark] = field(default_factory=tuple)
    ticks: Sequence[float] = ()
    """Values that the axis at the bottom names; empty chooses round ones."""
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)
    """Ribbons under the lines of the same names: (across, lower edge, upper edge)."""
    span: tuple[float, float] | None = None
    """Least and largest value of the other axis; None takes those of the lines."""


class Scale:
    """Values of one axis to pixels."""

    def __init__(self, values: Sequence[float], log: bool, begin: float, end: float) -> None:
        self.log = log
        own = [self.of(value) for value in values] or [0.0]
        # A constant value lies in the middle.
        slack = (max(own) - min(own)) * 0.04 or 0.5
        self.low = min(own) - slack
        self.high = max(own) + slack
        self.begin = begin
        self.end = end

    def of(self, value: float) -> float:
        """The value, or its logarithm."""
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = (self.of(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values within the axis, three to seven of them where there are any."""
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(n for n in (1, 2, 5, 10) if (self.high - self.low) / (step * n) <= 6)
            first = math.ceil(self.low / step)
            return [step * n for n in range(first, math.floor(self.high / step) + 1)]
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        if len(powers) >= 3:
            every = -(-len(powers) // 7)
            return [10.0**n for n in powers[::every]]
        span = range(math.floor(self.low), math.ceil(self.high) + 1)
        round_values = [digit * 10.0**n for n in span for digit in (1, 2, 5)]
        return [value for value in round_values if self.low <= math.log10(value) <= self.high]


def chart(rows: Sequence[Sequence[Panel]], title: str) -> str:
    """An SVG file of rows of panels under one legend; a line has one color in all of them.

    Points that a logarithmic axis cannot show, zeros and what is not finite, are left out.
    """
    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.lines))
    colors = {name: stroke(place) for place, name in enumerate(names)}
    columns = max(len(row) for row in rows)
    width = columns * WIDTH
    by_line = max(1, width // 190)
    legend = LEGEND * -(-len(names) // by_line) if len(names) > 1 else 0
    height = 34 + len(rows) * HEIGHT + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(10, 20, title, size=14),
    ]
    for down, row in enumerate(rows):
        for across, panel in enumerate(row):
            parts += drawn(panel, across * WIDTH, 30 + down * HEIGHT, colors)
    if legend:
        for place, name in enumerate(names):
            x = 12 + 190 * (place % by_line)
            y = 34 + len(rows) * HEIGHT + LEGEND * (place // by_line) + 6
            parts.append(f'<path d="M{x} {y}h18" stroke-width="2" {colors[name]}/>')
            parts.append(text(x + 23, y + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def one_panel(panel: Panel, colors: Mapping[str, str]) -> str:
    """An SVG element of one panel without a legend.

    Takes   colors: how each line is drawn, by `stroke`.
    """
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="11">',
            *drawn(panel, 0, 0, colors),
            "</svg>",
        ]
    )


def stroke(place: int) -> str:
    """How the line at a place of the legend is drawn; with the colors used up it is dashed."""
    dashes = ("", ' stroke-dasharray="5 2"', ' stroke-dasharray="1.5 2"')
    color = COLORS[place % len(COLORS)]
    return f'stroke="{color}"{dashes[place // len(COLORS) % len(dashes)]}'


def drawn(panel: Panel, x: float, y: float, colors: Mapping[str, str]) -> list[str]:
    """The elements of one panel whose upper left corner is at (x, y)."""
    lines = {name: shown(points, panel) for name, points in panel.lines.items()}
    every = [point for points in lines.values() for point in points]
    edges = [(a, b) for band in panel.bands.values() for a, low, high in band for b in (low, high)]
    every += shown(edges, panel)
    right = x + WIDTH - RIGHT
    bottom = y + HEIGHT - BOTTOM
    across = Scale([a for a, _ in every], panel.log_x, x + LEFT, right)
    up = Scale(
        [b for _, b in every] if panel.span is None else panel.span, panel.log_y, bottom, y + TOP
    )
    parts = [text(x + LEFT, y + TOP - 8, panel.title, size=12)]
    for value in panel.ticks or across.ticks():
        at = across(value)
        parts.append(f'<path d="M{at:.1f} {y + TOP}V{bottom}" stroke="#e5e5e5"/>')
        parts.append(text(at, bottom + 15, number(value), anchor="middle"))
    for value in up.ticks():
        at = up(value)
        parts.append(f'<path d="M{x + LEFT} {at:.1f}H{right}" stroke="#e5e5e5"/>')
        parts.append(text(x + LEFT - 5, at + 4, number(value), anchor="end"))
    parts.append(text((x + LEFT + right) / 2, bottom + 32, panel.across, anchor="middle"))
    parts.append(text(x + 8, y + TOP - 8, panel.up))
    for place, mark in enumerate(panel.marks):
        at = across(mark.at)
        dashed = 'stroke="#555" stroke-dasharray="4 3"'
        parts.append(f'<path d="M{at:.1f} {y + TOP}V{bottom}" {dashed}/>')
        parts.append(text(at + 3, y + TOP + 11 + 14 * place, mark.text))
    for name, band in panel.bands.items():
        edge = [(a, low) for a, low, _ in band] + [(a, high) for a, _, high in reversed(band)]
        places = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in shown(edge, panel))
        color = colors[name].replace("stroke", "fill", 1).split(" ")[0]
        parts.append(f'<polygon points="{places}" {color} opacity="0.2"/>')
    for name, points in lines.items():
        places = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
        style = f'fill="none" stroke-width="1.6" {colors[name]}'
        parts.append(
            f'<polyline points="{places}" {style}><title>{escape(name)}</title></polyline>'
        )
    return parts


def shown(points: Points, panel: Panel) -> list[tuple[float, float]]:
    """The points that the axes can show."""
    return [
        (x, y)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y)
        if (x > 0 or not panel.log_x) and (y > 0 or not panel.log_y)
    ]


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11) -> str:
    """A word at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f' fill="#333">{escape(words)}</text>'
    )


def number(value: float) -> str:
    """A tick's label."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 0.01 else f"{value:g}"


def picture_file(path: str | Path) -> Path:
    """The path of a picture, asked before the work that it shows.

    Raises  ConfigError if the name does not end in .svg.
    """
    file = Path(path)
    if file.suffix != ".svg":
        raise ConfigError(f"the picture {file} is an SVG file: name it {file.with_suffix('.svg')}")
    return file


def write_chart(path: str | Path, rows: Sequence[Sequence[Panel]], title: str) -> Path:
    """Write the SVG file.

    Raises  ConfigError if the name does not end in .svg; CastaliaError if it cannot be written.
    """
    file = picture_file(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(chart(rows, title), encoding="utf-8")
    except OSError as error:
        raise cannot_write(file, error) from error
    return file
