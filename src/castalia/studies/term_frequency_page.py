"""Pictures, tables and the page of the term-frequency study."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from castalia.analysis.html import NONE, section, table
from castalia.analysis.tuning.chart import Panel, chart
from castalia.core.files import atomic_write
from castalia.studies.page import figures, write_study_page
from castalia.studies.term_frequency_rows import Frequencies, Key, Row

BINS = 19
"""Points of a line at most, as in the published picture."""
IN_A_BIN = 4
"""Numbers in a point on average, at least."""
MOST_LINES = 6
"""Checkpoints in a picture, as in the published one."""
MOST_COLUMNS = 8
"""Checkpoints in a table of the page; the files have all."""
TITLE = "Accuracy against term frequency"
LEAD = (
    "Arithmetic questions to the checkpoints of a training run, and how often the run had read"
    " their first number by then."
)
ABOUT = (
    "Each point is the mean accuracy of the numbers that the model had read about as often before"
    " the checkpoint; numbers it had never read are left out."
)
GAP_ABOUT = (
    "Mean accuracy of the 10 numbers read most often less that of the 10 read least often, in"
    " percentage points (of fewer than 20 numbers, halves). Above 0 a model calculates better with"
    " what it has read more."
)


def write_pages(
    output: Path,
    rows: Sequence[Row],
    counts: Frequencies,
    average: Mapping[Key, float],
    gap: Mapping[Key, float],
) -> None:
    """Write index.html, the tables as CSV and Markdown, and the pictures as SVG files."""
    body = []
    markdown = []
    tasks = list(dict.fromkeys(row.task for row in rows))
    for task in tasks:
        drawn = pictures(rows, counts, task)
        for model, picture in drawn.items():
            with atomic_write(output / f"{task}-{model.replace('/', '-')}.svg") as file:
                file.write(picture)
        title = task.capitalize()
        if drawn:
            body.append(section(title, ABOUT, figures([*drawn.values()])))
        for name, about, values, form in (
            ("mean accuracy", "", average, "{:.1%}"),
            ("frequent less rare", GAP_ABOUT, gap, "{:+.1f}"),
        ):
            header, lines = cells(values, task, form)
            if lines:
                body.append(section(f"{title}: {name}", about, table(*narrowed(header, lines))))
                markdown.append(f"## {title}: {name}\n\n{about}\n\n{pipes(header, lines)}")
    with atomic_write(output / "table.md") as file:
        file.write("\n".join(markdown))
    write_table_csv(output / "table.csv", average, gap)
    files = "accuracy.csv and table.csv"
    write_study_page(output, TITLE, LEAD, "".join(body), tables=files, width=356)


def write_table_csv(path: Path, average: Mapping[Key, float], gap: Mapping[Key, float]) -> None:
    """One line a model, step, task and number of shots."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, "accuracy", "gap"])
        writer.writerows([*key, average[key], gap.get(key, "")] for key in sorted(average))


def pictures(rows: Sequence[Row], counts: Frequencies, task: str) -> dict[str, str]:
    """By model the picture of accuracy against frequency, with the most shots that it was asked
    with; nothing for a model without frequencies."""
    own = [row for row in rows if row.task == task and counts.get((row.model, row.step, row.x1))]
    models = list(dict.fromkeys(row.model for row in own))
    panels: dict[str, Panel] = {}
    for model in models:
        shots = max(row.shots for row in own if row.model == model)
        by_step: dict[int, list[tuple[int, float]]] = {}
        for row in own:
            if row.model == model and row.shots == shots:
                times = counts[model, row.step, row.x1]
                by_step.setdefault(row.step, []).append((times, row.right))
        lines = {f"step {step:,}": binned(by_step[step]) for step in spread(sorted(by_step))}
        across = f"occurrences before the checkpoint ({shots} shots)"
        panels[model] = Panel("accuracy", lines, across, log_y=False)
    # One scale for all models, or small ones would look like large ones.
    top = max((y for p in panels.values() for line in p.lines.values() for _, y in line), default=0)
    drawn = {}
    for model, panel in panels.items():
        scaled = Panel(panel.title, panel.lines, panel.across, log_y=False, span=(0.0, top or 0.05))
        drawn[model] = chart([[scaled]], f"{model}, {task}")
    return drawn


def binned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over bins of equal width on a logarithmic axis, at the mean of the logarithms."""
    # Few numbers in many bins are a zigzag of single questions.
    most = min(BINS, max(2, len(points) // IN_A_BIN))
    low = math.log(min(times for times, _ in points))
    width = (math.log(max(times for times, _ in points)) - low) / most or 1.0
    bins: dict[int, list[tuple[float, float]]] = {}
    for times, right in points:
        number = min(int((math.log(times) - low) / width), most - 1)
        bins.setdefault(number, []).append((math.log(times), right))
    line = []
    for _, own in sorted(bins.items()):
        size = len(own)
        line.append((math.exp(sum(x for x, _ in own) / size), sum(y for _, y in own) / size))
    return line


def spread(steps: Sequence[int], most: int = MOST_LINES) -> list[int]:
    """At most so many of the steps, evenly over their list, the last one among them."""
    if len(steps) <= most:
        return list(steps)
    last = len(steps) - 1
    return [steps[last - last * back // (most - 1)] for back in range(most - 1, -1, -1)]


def cells(values: Mapping[Key, float], task: str, form: str) -> tuple[list[str], list[list[str]]]:
    """A table: a line for each model and number of shots, a column for each checkpoint."""
    own = {key: value for key, value in values.items() if key.task == task}
    steps = sorted({key.step for key in own})
    lines = []
    for model, shots in dict.fromkeys((key.model, key.shots) for key in own):
        found = [own.get(Key(model, step, task, shots)) for step in steps]
        lines.append(
            [model, str(shots), *(NONE if each is None else form.format(each) for each in found)]
        )
    return ["model", "shots", *(f"step {step:,}" for step in steps)], lines


def narrowed(
    header: Sequence[str], lines: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The table with MOST_COLUMNS checkpoints at most."""
    places = [0, 1, *spread(range(2, len(header)), MOST_COLUMNS)]
    return [header[i] for i in places], [[line[i] for i in places] for line in lines]


def pipes(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    bar = ["---", *("--:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, bar, *lines])
