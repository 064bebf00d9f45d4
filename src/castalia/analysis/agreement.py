"""A picture of agreement: medians over seeds by step, with the middle half as a ribbon."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from castalia.analysis.chart_page import charts, write_chart_page
from castalia.analysis.html import section
from castalia.analysis.tuning.chart import Panel, write_chart
from castalia.weights.agreement import SEEDS, SELF, Agreement

Values = Mapping[str, Mapping[int, Sequence[float]]]
"""Values by group and step."""
ABOUT = (
    "Medians over seeds, and the middle half as a ribbon. Kappa is 1 where all answers are equal,"
    " and 0 where as many are as chance gives. The axis at the bottom is the logarithm of the step;"
    " step 0 has no place on it."
)


def write_agreement(rows: Sequence[Agreement], path: str | Path) -> Path:
    """Write an SVG file: a row of charts for each task.

    Raises  ConfigError if the name does not end in .svg; CastaliaError if it cannot be written.
    """
    charts_of_tasks = [panels(task, own) for task, own in by_task(rows).items()]
    return write_chart(path, charts_of_tasks, "Agreement")


def write_agreement_page(rows: Sequence[Agreement], path: str | Path) -> Path:
    """Write the same charts as a page, whose charts stand below each other on a phone.

    Raises  CastaliaError if it cannot be written.
    """
    body = ""
    for task, own in by_task(rows).items():
        drawn = panels(task, own)
        names = list(dict.fromkeys(name for each in drawn for name in each.lines))
        body += section(task, "", charts(drawn, names))
    return write_chart_page(path, "Agreement", ABOUT, body)


def by_task(rows: Sequence[Agreement]) -> dict[str, list[Agreement]]:
    """The comparisons of each task, by its name with the shots."""
    tasks: dict[str, list[Agreement]] = defaultdict(list)
    for row in rows:
        shots = "" if not row.shots else f" {row.shots}-shot"
        tasks[f"{row.task}{shots}"].append(row)
    return tasks


def panels(task: str, rows: Sequence[Agreement]) -> list[Panel]:
    """Accuracy, agreement with the last step, and agreement between seeds."""
    charts = [
        panel(f"{task}: accuracy", accuracies(rows)),
        panel("kappa with the last step", kappas(rows, SELF)),
        panel("kappa between seeds", kappas(rows, SEEDS)),
    ]
    return [chart for chart in charts if chart.lines]


def accuracies(rows: Sequence[Agreement]) -> Values:
    """The accuracy of each checkpoint, by group and step."""
    known: dict[tuple[str, str, int], float] = {}
    for row in rows:
        sides = (
            (row.model, row.step, row.accuracy),
            (row.other, row.other_step, row.other_accuracy),
        )
        for model, step, accuracy in sides:
            if accuracy is not None:
                known[row.group, model, step] = accuracy
    return collected((group, step, value) for (group, _, step), value in known.items())


def kappas(rows: Sequence[Agreement], kind: str) -> Values:
    """Kappa of one kind of comparison, by group and step."""
    return collected(
        (row.group, row.step, row.kappa)
        for row in rows
        if row.kind == kind and row.kappa is not None
    )


def collected(numbers: Iterable[tuple[str, int, float]]) -> Values:
    """Values by group and step; step 0 has no place on the axis."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group, step, number in numbers:
        if step > 0:
            values[group][step].append(number)
    return values


def panel(title: str, values: Values) -> Panel:
    """The median of each group by step, over the quartiles as a ribbon."""
    lines: dict[str, list[tuple[float, float]]] = {}
    bands: dict[str, list[tuple[float, float, float]]] = {}
    for group, by_step in values.items():
        quartiles = [
            (step, *np.quantile(numbers, (0.25, 0.5, 0.75)))
            for step, numbers in sorted(by_step.items())
        ]
        lines[group] = [(step, float(median)) for step, _, median, _ in quartiles]
        bands[group] = [(step, float(low), float(high)) for step, low, _, high in quartiles]
    # Both are at most 1; kappa below 0 is less agreement than chance gives.
    lowest = min((low for band in bands.values() for _, low, _ in band), default=0.0)
    span = (min(0.0, lowest), 1.0)
    return Panel(title, lines, "step", log_y=False, bands=bands, span=span)
