"""A picture of agreement: medians over seeds by step, with the middle half as a ribbon."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from castalia.analysis.tuning.chart import Panel, write_chart
from castalia.weights.agreement import SEEDS, SELF, Agreement

Values = Mapping[str, Mapping[int, Sequence[float]]]
"""Values by group and step."""


def write_agreement(rows: Sequence[Agreement], path: str | Path) -> Path:
    """Write an SVG file: a row of charts for each task.

    Raises  ConfigError if the name does not end in .svg; CastaliaError if it cannot be written.
    """
    tasks: dict[str, list[Agreement]] = defaultdict(list)
    for row in rows:
        shots = "" if not row.shots else f" {row.shots}-shot"
        tasks[f"{row.task}{shots}"].append(row)
    return write_chart(path, [panels(task, own) for task, own in tasks.items()], "Agreement")


def panels(task: str, rows: Sequence[Agreement]) -> list[Panel]:
    """Accuracy, agreement with the last step, and agreement between seeds."""
    charts = [
        panel(f"{task}: accuracy", gathered(rows, SELF, lambda row: row.accuracy)),
        panel("kappa with the last step", gathered(rows, SELF, lambda row: row.kappa)),
        panel("kappa between seeds", gathered(rows, SEEDS, lambda row: row.kappa)),
    ]
    return [chart for chart in charts if chart.lines]


def gathered(
    rows: Sequence[Agreement], kind: str, value: Callable[[Agreement], float | None]
) -> Values:
    """The values of one kind by group and step; step 0 has no place on the axis."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        number = value(row)
        if row.kind == kind and row.step > 0 and number is not None:
            values[row.group][row.step].append(number)
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
    return Panel(title, lines, "step", log_y=False, bands=bands)
