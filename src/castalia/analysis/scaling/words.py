"""A fit as tables of text, for the terminal and for the page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from castalia.analysis.html import NONE
from castalia.monitor import quantity

Table = tuple[str, list[str], list[list[str]]]
"""Title, header and rows."""


def tables_of(values: Mapping[str, Any]) -> list[Table]:
    """The tables of a fit, from its JSON values; those without rows are left out."""
    tables = [
        numbers_table(values),
        points_table(values),
        held_out_table(values),
        predictions_table(values),
        frontier_table(values),
    ]
    return [table for table in tables if table[2]]


def numbers_table(values: Mapping[str, Any]) -> Table:
    """E, A, alpha, B and beta."""
    rows: list[list[str]] = []
    for name, number in values["numbers"].items():
        interval = between(number["low"], number["high"], ".4g")
        rows.append([name, text(number["value"], ".4g"), interval, text(number["stderr"], ".2g")])
    count = values["replicates"]
    title = "Law"
    if count:
        title += f", with {values['interval']:.0%} intervals of {count} replicates"
    return title, ["", "value", "interval", "standard error"], rows


def points_table(values: Mapping[str, Any]) -> Table:
    """The points of the fit with their residuals."""
    points = values["points"]
    rows = [
        [*point_cells(name, point), percent(point["residual"])]
        for name, point in zip(names_of(points), points, strict=True)
    ]
    title = f"Points, residuals of {values['residual_rms']:.2%} (root mean square)"
    return title, ["run", "N", "D", "loss", "fitted", "residual"], rows


def held_out_table(values: Mapping[str, Any]) -> Table:
    """The points held out with the error of the prediction."""
    rows: list[list[str]] = []
    held_out = values["held_out"]
    for name, point in zip(names_of(held_out), held_out, strict=True):
        interval = between(point["low"], point["high"], ".4f")
        rows.append([*point_cells(name, point), interval, percent(point["residual"])])
    return "Held out", ["run", "N", "D", "loss", "predicted", "interval", "difference"], rows


def names_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of points: the run, with the step where it has several."""
    counts = Counter(point["run"] for point in points)
    return [
        point["run"] if counts[point["run"]] == 1 else f"{point['run']} @{point['step']}"
        for point in points
    ]


def point_cells(name: str, point: Mapping[str, Any]) -> list[str]:
    """The cells that points of the fit and others share."""
    return [
        name,
        quantity(point["parameters"]),
        count(point["tokens"]),
        text(point["loss"], ".4f"),
        text(point["fitted"], ".4f"),
    ]


def predictions_table(values: Mapping[str, Any]) -> Table:
    """The predictions."""
    rows: list[list[str]] = []
    for each in values["predictions"]:
        place = [
            NONE if each[name] is None else quantity(each[name])
            for name in ("parameters", "tokens")
        ]
        interval = between(each["low"], each["high"], ".4f")
        rows.append([*place, text(each["loss"], ".4f"), interval, f"{each['beyond']:.3g}x"])
    return "Predictions", ["N", "D", "loss", "interval", "beyond the points"], rows


def frontier_table(values: Mapping[str, Any]) -> Table:
    """The best model for each budget."""
    frontier = values["frontier"]
    header = ["C = 6ND (FLOPs)", "N", "interval", "D", "D/N", "loss"]
    if not frontier:
        return "", header, []
    rows: list[list[str]] = []
    for place, compute in enumerate(frontier["compute"]):
        interval = NONE
        if frontier["parameters_low"]:
            low = frontier["parameters_low"][place]
            high = frontier["parameters_high"][place]
            interval = f"{count(low)} to {count(high)}"
        rows.append(
            [
                f"{compute:.3g}",
                count(frontier["parameters"][place]),
                interval,
                count(frontier["tokens"][place]),
                text(frontier["tokens_per_parameter"][place], ".3g"),
                text(frontier["loss"][place], ".4f"),
            ]
        )
    slope = frontier["exponent"]
    interval = ""
    if frontier["exponent_low"] is not None:
        interval = f" ({between(frontier['exponent_low'], frontier['exponent_high'], '.3f')})"
    title = f"Compute-optimal: N ~ C^{slope:.3f}{interval}, D ~ C^{1 - slope:.3f}"
    return title, header, rows


def text(value: float | None, digits: str) -> str:
    """A number; a dash for one that is unknown or infinite."""
    return NONE if value is None else format(value, digits)


def count(value: float | None) -> str:
    """A count, in powers of ten."""
    return NONE if value is None else quantity(value)


def percent(value: float) -> str:
    """A relative difference."""
    return f"{value:+.2%}"


def between(low: float | None, high: float | None, digits: str) -> str:
    """An interval."""
    if low is None and high is None:
        return NONE
    return f"{text(low, digits)} to {text(high, digits)}"
