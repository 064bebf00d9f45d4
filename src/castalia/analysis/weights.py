"""A page of weight statistics: curves over the steps, a line for each layer."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.analysis.chart_page import charts, write_chart_page
from castalia.analysis.html import section
from castalia.analysis.tuning.chart import Panel, Points
from castalia.core.errors import DataError
from castalia.weights.table import read_table

MOST_LINES = 8
"""Layers that a chart shows, spread over the depth of the model."""
WIDE = 10
"""Largest over smallest value from which an axis is logarithmic."""


class Quantity(NamedTuple):
    """One chart."""

    column: str
    title: str
    log_y: bool
    level: str = "layer"


PER_STEP = "per_step"
"""from_previous over the steps between: checkpoints are rarely evenly spaced."""
QUANTITIES = (
    Quantity("l2", "L2 norm", True),
    Quantity("from_start", "distance from the first checkpoint", True),
    Quantity(PER_STEP, "distance from the checkpoint before, per step", True),
    Quantity("cosine_start", "cosine with the first checkpoint", False),
    Quantity("kurtosis", "kurtosis (3: normal distribution)", False),
    Quantity("largest", "largest absolute weight", True),
    Quantity("spectral_norm", "spectral norm, mean of matrices", True, "tensor"),
    Quantity("stable_rank", "stable rank, mean of matrices", True, "tensor"),
    Quantity("participation", "directions that carry a matrix, mean", True, "tensor"),
)
DRIFT = (
    Quantity("peer_distance", "distance between the two", True, "matrices"),
    Quantity("peer_cosine", "cosine between the two", False, "matrices"),
)
ABOUT = (
    "The axis at the bottom is the logarithm of the step; step 0 has no place on it. Norms and"
    " distances are over all weights of a layer."
)
ABOUT_DRIFT = (
    "The matrices at the same step of two models with equal shapes. A cosine near 0 means that they"
    " have nothing in common, which is so for two seeds, whose layers may still compute the same."
)

Rows = Sequence[Mapping[str, Any]]


def write_weights_page(table: str | Path, output: str | Path) -> Path:
    """Write the page of a table of `castalia weights`.

    Raises  DataError for another file, or an empty one; CastaliaError if it cannot be written.
    """
    rows = [row | {PER_STEP: per_step(row)} for row in read_table(table).to_pylist()]
    if not rows:
        raise DataError(f"{table} has no checkpoints; measure some first")
    body = "".join(
        [model_section(name, own) for name, own in by(rows, "model").items()]
        + [drift_section(rows)]
    )
    return write_chart_page(output, "Weights over training", ABOUT, body)


def per_step(row: Mapping[str, Any]) -> float | None:
    """How far the weights went in each step since the checkpoint before."""
    if row["from_previous"] is None:
        return None
    return float(row["from_previous"]) / (row["step"] - row["previous"])


def by(rows: Rows, column: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by a column, in the order of the table."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row[column]].append(row)
    return groups


def model_section(name: str, rows: Rows) -> str:
    """The charts of one model."""
    steps = sorted({row["step"] for row in rows})
    chosen = spread(list(dict.fromkeys(group_of(row) for row in rows if row["level"] == "layer")))
    panels = [panel_of(quantity, rows, chosen) for quantity in QUANTITIES]
    about = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}."
    return section(name, about, charts([panel for panel in panels if panel is not None], chosen))


def panel_of(quantity: Quantity, rows: Rows, chosen: Sequence[str]) -> Panel | None:
    """The chart of one quantity; None where no checkpoint has it."""
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = row[quantity.column]
        if row["level"] == quantity.level and value is not None and row["step"] > 0:
            lines[group_of(row)][row["step"]].append(value)
    means = {
        name: [(step, sum(values) / len(values)) for step, values in sorted(lines[name].items())]
        for name in chosen
        if name in lines
    }
    return drawable(quantity, means)


def drawable(quantity: Quantity, lines: Mapping[str, Points]) -> Panel | None:
    """The chart of some lines; None where there is nothing to draw.

    The axis is logarithmic only where the values span a power of ten: a narrow one would have no
    tick on it.
    """
    values = [value for points in lines.values() for _, value in points if value > 0]
    if max(map(len, lines.values()), default=0) < 2:
        return None
    log_y = quantity.log_y and bool(values) and max(values) > WIDE * min(values)
    return Panel(quantity.title, lines, "step", log_y=log_y)


def group_of(row: Mapping[str, Any]) -> str:
    """The line that a row belongs to: its layer, or the part of the model outside of them."""
    if row["layer"] is not None:
        return f"layer {row['layer']}"
    return str(row["name"]).split(".")[0]


def spread(names: Sequence[str]) -> list[str]:
    """At most MOST_LINES of the lines: what is outside the layers, and layers at all depths."""
    layers = [name for name in names if name.startswith("layer ")]
    outside = [name for name in names if name not in layers]
    room = max(2, MOST_LINES - len(outside))
    if len(layers) > room:
        places = [math.floor(place * (len(layers) - 1) / (room - 1)) for place in range(room)]
        layers = [layers[place] for place in places]
    return [name for name in names if name in outside or name in layers]


def drift_section(rows: Rows) -> str:
    """How far models of equal shapes are from each other, a line for each pair; "" without one."""
    panels: list[Panel] = []
    names: list[str] = []
    for quantity in DRIFT:
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            value = row[quantity.column]
            if row["level"] == quantity.level and value is not None and row["step"] > 0:
                lines[f"{row['model']} / {row['peer']}"].append((row["step"], value))
        panel = drawable(quantity, lines)
        if panel is not None:
            panels.append(panel)
            names += [name for name in lines if name not in names]
    if not panels:
        return ""
    return section("Between models", ABOUT_DRIFT, charts(panels, names))
