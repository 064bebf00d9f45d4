"""`Panel` and `Series`: a chart of the report page as data, which page.js draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from castalia.analysis.axes import DETAIL, extremes
from castalia.analysis.runs import Curve, Vector
from castalia.analysis.smoothing import WINDOWS, local_linear

Smooth = Callable[[Vector, Vector, float], Curve]
"""Steps, values and a window -> the smoothed curve."""
Kind = Literal["lines", "shares", "heat", "events"]


@dataclass(frozen=True)
class Series:
    """One curve of a panel."""

    name: str
    run: int
    """Place of the run on the page."""
    curve: Curve
    marks: bool = False
    """Whether each point has a marker: few points, such as validations. Marks are not smoothed."""
    smoothed: bool = True
    colour: int | None = None
    """Place in the palette; None for the colour of the run."""
    dash: int = 0
    """Place in the list of dashes, for curves of one colour."""
    texts: Sequence[str] = ()
    """A text for each point, on hover."""


def look(number: int, runs: int) -> tuple[int | None, int]:
    """Colour and dash of the curve `number` of each run, in a panel of several curves a run.

    The colour tells runs apart where there are several, and the dash their curves.
    """
    if runs == 1:
        return number, 0
    return None, number


@dataclass(frozen=True)
class Panel:
    """One chart of the page."""

    title: str
    unit: str
    """Of the values; "" for a number without one."""
    about: str
    series: list[Series]
    kind: Kind = "lines"
    """lines; shares of a whole, stacked; a heat map with a row a series; events in lanes."""
    log: bool = False
    """Whether the values are on a logarithmic axis until the reader chooses."""
    wide: bool = False
    """Whether the chart takes the whole width of the page."""
    detail: int = DETAIL
    """Steps of a curve that are drawn one by one."""
    few: Sequence[str] = ()
    """Names of the curves that are switched on at first; all without any."""

    def data(self, smooth: Smooth = local_linear) -> dict[str, Any]:
        """The panel as JSON values for page.js.

        smooth  `local_linear`, or what keeps its results.
        """
        return {
            "title": self.title,
            "unit": self.unit,
            "kind": self.kind,
            "log": self.log,
            "few": list(self.few),
            "series": [self.series_data(series, smooth) for series in self.series],
        }

    def series_data(self, series: Series, smooth: Smooth = local_linear) -> dict[str, Any]:
        """One curve: its points, and the smoothed curve for each window of the slider."""
        steps, values = series.curve
        shown = np.arange(len(steps))
        # Shares and events are drawn by points that were chosen before.
        if self.kind == "lines":
            shown = extremes(steps, values, self.detail)
        # For every window here, since the page has not the points that are not drawn.
        fits = {}
        if series.smoothed and not series.marks and len(steps) > 2:
            for window in WINDOWS:
                fits[f"{window:g}"] = packed(*smooth(steps, values, window))
        return {
            "name": series.name,
            "run": series.run,
            "marks": series.marks,
            "colour": series.colour,
            "dash": series.dash,
            "texts": list(series.texts),
            "points": packed(steps[shown], values[shown]),
            "whole": len(shown) == len(steps),
            "fits": fits,
        }


def packed(steps: np.ndarray, values: np.ndarray) -> dict[str, list[Any]]:
    """A curve as JSON values: steps as differences, which compress to little."""
    return {
        "steps": np.diff(steps, prepend=0).astype(int).tolist(),
        "values": rounded(values),
    }


def rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    """Values with some significant digits; six are what fp32 holds."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
