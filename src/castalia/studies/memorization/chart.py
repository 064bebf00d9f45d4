"""Charts as data: what memorization.js draws, with names of colours in place of colours.

A text such as "--c0" in a trace is a colour of the page's palette, "--c0/0.2" the same with that
opacity: which colour it is depends on whether the reader has a light or a dark screen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

Trace = dict[str, Any]
Line = Mapping[str, Any]
"""A line of a study's table."""
Key = tuple[int, ...]
"""The option chosen in each menu."""

COLOURS = 8
"""Of the palette; the next ones are the same with another dash."""
DASHES = ("solid", "dash", "dot", "dashdot")
WIDE_RATIO = 30
"""Largest over smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """One axis."""

    title: str
    """With the unit."""
    log: bool = False
    suffix: str = ""
    """Of the numbers at its ticks."""
    zero: bool = False
    """Whether it begins at 0."""
    values: Sequence[Any] = ()
    """Its ticks; empty for round numbers."""
    names: Sequence[str] = ()
    """What stands at them."""


@dataclass(frozen=True)
class View:
    """What a chart shows for one choice of the reader."""

    traces: list[Trace]
    x: Axis
    y: Axis
    kind: str = "lines"
    """lines, or heat for a square of cells."""
    empty: str = ""
    """A sentence in place of a picture."""


@dataclass(frozen=True)
class Choice:
    """A menu above a chart."""

    title: str
    options: Sequence[str]
    chosen: int = 0


@dataclass(frozen=True)
class Chart:
    """One chart of the page, with a view for each combination of its choices."""

    title: str
    unit: str
    about: str
    views: Mapping[Key, View]
    choices: Sequence[Choice] = field(default_factory=tuple)
    wide: bool = False

    def data(self) -> dict[str, Any]:
        """The chart as JSON values."""
        return {
            "title": self.title,
            "choices": [vars(choice) for choice in self.choices],
            "views": {
                ",".join(map(str, key)): {
                    **vars(view),
                    "x": vars(view.x),
                    "y": vars(view.y),
                }
                for key, view in self.views.items()
            },
        }

    def box(self, number: int) -> str:
        """The HTML that the script fills."""
        wide = ""
        if self.wide:
            wide = " spread"
        unit = ""
        if self.unit:
            unit = f' <span class="unit">{escape(self.unit)}</span>'
        return (
            f'<figure class="panel{wide}" data-chart="{number}"><figcaption>'
            f"<h2>{escape(self.title)}{unit}</h2>"
            f'<p class="about">{escape(self.about)}</p></figcaption><div class="choices"></div>'
            f'<div class="plot" role="img" aria-label="{escape(self.title)}"></div></figure>'
        )


def colour(number: int, share: float | None = None) -> str:
    """The colour of a curve, and its opacity."""
    name = f"--c{number % COLOURS}"
    if share is None:
        return name
    return f"{name}/{share}"


def curve(
    name: str,
    number: int,
    lines: Iterable[Line],
    x: str,
    y: str,
    ends: tuple[str, str] | None = None,
    *,
    scale: float = 1.0,
    hover: str = "",
) -> Trace:
    """A curve with marks over columns of a table, with its intervals as bars.

    ends   columns of the interval.
    scale  what the values are multiplied by: 100 for percent.
    hover  Plotly's template of a point after the name.
    """
    rows = [line for line in lines if line[y] is not None]
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [line[x] for line in rows],
        "y": [short(line[y] * scale) for line in rows],
        "line": {
            "color": colour(number),
            "width": 2,
            "dash": DASHES[number // COLOURS % len(DASHES)],
        },
        "marker": {"size": 7, "color": colour(number)},
        "hovertemplate": f"<b>{name}</b><br>{hover}<extra></extra>",
    }
    if ends is None:
        return trace
    low, high = ends
    # Without an interval the bar has no length.
    up = [0.0 if line[high] is None else scale * (line[high] - line[y]) for line in rows]
    down = [0.0 if line[low] is None else scale * (line[y] - line[low]) for line in rows]
    trace["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": [short(value) for value in up],
        "arrayminus": [short(value) for value in down],
        "color": colour(number, 0.6),
        "thickness": 1.5,
        "width": 3,
    }
    return trace


def band(
    name: str, number: int, x: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> Trace:
    """A filled interval behind a curve."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [*x, *reversed(x)],
        "y": [short(value) for value in [*high, *reversed(low)]],
        "line": {"width": 0, "color": colour(number)},
        "fill": "toself",
        "fillcolor": colour(number, 0.16),
        "hoverinfo": "skip",
        "showlegend": False,
    }


def short(value: float) -> float:
    """A number in the five digits that a picture shows."""
    return float(f"{value:.5g}")


def is_wide(values: Iterable[float]) -> bool:
    """Whether an axis over these values is logarithmic."""
    numbers = list(values)
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE_RATIO


def steps_axis(steps: Iterable[int]) -> Axis:
    """The axis of checkpoints."""
    values = sorted(set(steps))
    ticks: Sequence[int] = ()
    # More labels than eight overlap on a narrow page; round numbers take their place.
    if len(values) <= 8:
        ticks = values
    return Axis("checkpoint (training steps)", is_wide(values), values=ticks)


def where(lines: Iterable[Line], **values: Any) -> list[Line]:
    """The lines with these values."""
    return [line for line in lines if all(line[key] == value for key, value in values.items())]
