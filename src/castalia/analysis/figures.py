"""The table of final values: a column for each run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from castalia.analysis.axes import axes_of
from castalia.analysis.events import events_of
from castalia.analysis.html import NONE
from castalia.analysis.measures import LEARNING, MACHINE, Final, Measure, other_measures
from castalia.analysis.runs import Curve, RunFiles, Vector, inner
from castalia.analysis.smoothing import ending
from castalia.monitor import duration, quantity


def final_rows(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Rows of the table: what it is, and the value of each run."""
    rows = progress_rows(runs)
    for measure in (*LEARNING, *other_measures(runs), *MACHINE):
        rows += measure_rows(measure, runs)
    rows += bits_rows(runs)
    # A row in which no run has a value says nothing.
    return [row for row in rows if set(row[1:]) != {NONE}]


def measure_rows(measure: Measure, runs: Sequence[RunFiles]) -> list[list[str]]:
    """A row for each key of a measure."""
    rows: list[list[str]] = []
    for key in measure.keys:
        cells: list[str] = []
        for run in runs:
            steps, values = key.curve(run)
            cells.append(final_value((steps, values / measure.divisor), key.final, measure.digits))
        name = measure.title
        # Not "Loss scale, loss scale".
        if key.name.lower() != name.lower():
            name += f", {key.name}"
        rows.append([f"{name}{FINAL_WORDS[key.final]}{unit(measure)}", *cells])
    return rows


FINAL_WORDS: dict[Final, str] = {
    "fit": ", at the end",
    "last": ", last",
    "median": ", median",
    "largest": ", largest",
}


def unit(measure: Measure) -> str:
    """The unit of a measure, in brackets."""
    return f" ({measure.unit})" if measure.unit else ""


def final_value(curve: Curve, final: Final, digits: str) -> str:
    """One cell of the table."""
    steps, values = curve
    if not len(steps):
        return NONE
    value = float(values[-1])
    if final == "fit":
        value, _ = ending(steps, values)
    elif final == "median":
        value = float(np.median(values))
    elif final == "largest":
        value = float(values.max())
    return format(value, digits)


def progress_rows(runs: Sequence[RunFiles]) -> list[list[str]]:
    """How far each run came, and what stood in its way."""
    cells = [progress_cells(run) for run in runs]
    return [[name, *(each[name] for each in cells)] for name in cells[0]]


def progress_cells(run: RunFiles) -> dict[str, str]:
    """The cells of one run by the name of the row."""
    axes = axes_of(run)
    lanes = Counter(event.lane for event in events_of(run))
    return {
        "Steps": steps_text(run),
        "Tokens": axis_end(axes.tokens, quantity),
        "Training time": axis_end(axes.seconds, duration),
        "Model FLOPs": axis_end(axes.flops, lambda flops: f"{flops:.3g}"),
        "Steps without an update": count_text(lanes["skipped step"]),
        "Rollbacks": count_text(lanes["rollback"]),
    }


def steps_text(run: RunFiles) -> str:
    """Steps made, of those that the config asks for."""
    if not run.metrics:
        return NONE
    asked = inner(run.config, ("train", "steps"))
    last = run.metrics[-1]["step"]
    if asked in (None, last):
        return f"{last:,}"
    return f"{last:,} of {asked:,}"


def axis_end(axis: Vector | None, text: Callable[[float], str]) -> str:
    """The end of an axis, as text."""
    if axis is None or not len(axis):
        return NONE
    return text(float(axis[-1]))


def count_text(count: int) -> str:
    """A number of events; a row without any is left out."""
    return str(count) if count else NONE


def bits_rows(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Bits per byte of each source at the last checkpoint that was measured."""
    lasts = [(run.bits or [{"sources": {}}])[-1] for run in runs]
    rows: list[list[str]] = []
    for name in dict.fromkeys(name for last in lasts for name in last["sources"]):
        rows.append([f"Bits per byte of {name}, last", *(bits_text(last, name) for last in lasts)])
    return rows


def bits_text(mark: Mapping[str, Any], name: str) -> str:
    """One source's bits per byte at one checkpoint, which may not have measured it."""
    value = mark["sources"].get(name)
    return f"{value['bits_per_byte']:.3f}" if value else NONE
