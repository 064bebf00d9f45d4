"""The scaling law on a report page: a section of HTML, and the data that scaling.js draws."""

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any, NamedTuple

from castalia.analysis.html import folded, section, table
from castalia.analysis.runs import RunFiles
from castalia.analysis.scaling.checks import LAWS, LEAST_VALUES
from castalia.analysis.scaling.fit import LARGEST, fit_scaling
from castalia.analysis.scaling.of_runs import points_of_runs
from castalia.analysis.scaling.points import Point, Points, column, groups
from castalia.analysis.scaling.values import fit_values
from castalia.analysis.scaling.words import tables_of
from castalia.core.errors import CastaliaError

TITLE = "Scaling law"
LEAST_RUNS = 4
"""Runs from which a page has the section: as many as the smallest law needs points."""
REPLICATES = 100


class ScalingPart(NamedTuple):
    """What a page has of the law."""

    html: str
    """A section, with a place for the chart; "" for runs that are no suite."""
    data: dict[str, Any] | None
    """`ScalingFit.data()`; None without a fit."""


def scaling_part(runs: Sequence[RunFiles]) -> ScalingPart:
    """The scaling law of the runs of a page.

    Runs of one size and length compare something else, and have no section. Where a suite has no
    fit, the section says why.
    """
    if len(runs) < LEAST_RUNS:
        return ScalingPart("", None)
    try:
        source = points_of_runs(runs)
        if not is_suite(source.points):
            return ScalingPart("", None)
        values = fitted(tuple(source.points), source.metric, source.counted, tuple(source.notes))
    except CastaliaError as error:
        return ScalingPart(section(TITLE, f"No law was fitted: {error}.", ""), None)
    return ScalingPart(html_of(values), values)


def is_suite(points: Sequence[Point]) -> bool:
    """Whether the points are of several sizes or lengths."""
    return any(
        len(groups(column(points, name))) >= min(LEAST_VALUES, len(points)) for name in LAWS["both"]
    )


# A page that is served live asks again with the same points whenever another file has changed.
@lru_cache(maxsize=8)
def fitted(
    points: tuple[Point, ...], metric: str, counted: str, notes: tuple[str, ...]
) -> dict[str, Any]:
    """The values of the fit, with the points of the largest size predicted from the others.

    Raises  DataError as `fit_scaling`.
    """
    source = Points(list(points), metric, counted, list(notes))
    values = fit_values(fit_scaling(source, bootstrap=REPLICATES))
    try:
        smaller = fit_scaling(source, hold_out=[LARGEST], bootstrap=REPLICATES)
    except CastaliaError:
        return values  # too few sizes to hold one out
    if smaller.law.variables == tuple(values["variables"]):
        values["held_out"] = fit_values(smaller)["held_out"]
    return values


def html_of(values: dict[str, Any]) -> str:
    """The section: the law in words, its chart and its tables."""
    law, points, *others = tables_of(values)
    parts = ['<div class="panel"><div class="plot" id="scaling" role="img"></div></div>']
    parts.append(table(law[1], law[2], "numbers final"))
    parts += [f'<p class="about">{escape(note)}</p>' for note in values["notes"]]
    for title, header, rows in (*others, points):
        if title == "Held out":
            title = "The largest size, predicted from the smaller ones"
        parts.append(folded(title, table(header, rows)))
    about = f"{values['formula']}. Loss: {values['metric']}. N: {values['parameters_counted']}."
    if values["replicates"]:
        about += f" Intervals: {values['interval']:.0%} of {values['replicates']} bootstraps."
    return section(TITLE, about, "".join(parts))
