"""Charts of scans beside each other: shares, predictions, correlations."""

from collections import defaultdict
from dataclasses import replace
from html import escape
from typing import Any

from castalia.memorization.analyses.study import COMMON, SEEN, Study
from castalia.studies.memorization.chart import (
    Axis,
    Chart,
    Choice,
    Key,
    Line,
    View,
    curve,
    is_wide,
    steps_axis,
    where,
)

MEASURES: dict[str, tuple[str, tuple[str, str], str, float]] = {
    "share memorized": ("share", ("share_low", "share_high"), "%", 100.0),
    "mean score": ("mean_score", ("mean_low", "mean_high"), "", 1.0),
    "rows memorized": ("memorized", ("share_low", "share_high"), "", 1.0),
}
"""What a chart of shares may show: column, columns of the interval, unit, factor."""
QUALITIES = ("recall", "precision", "f1", "false_positive_rate")
WORDS = {"f1": "F1", "false_positive_rate": "false positive rate"}
SELECTIONS = (
    ("all rows", "pearson", "all rows, Pearson"),
    ("all rows", "spearman", "all rows, Spearman"),
    ("top 10%", "pearson", "top 10%, Pearson"),
    ("top 1%", "pearson", "top 1%, Pearson"),
    ("memorized or not", "pearson", "memorized or not, Pearson"),
)
"""Rows, measure, and their name in the menu."""


def names_of(study: Study) -> list[str]:
    """The models, from the smallest to the largest."""
    return list(dict.fromkeys(scan.file.name for scan in study.scans))


def steps_of(study: Study) -> list[int]:
    """All checkpoints."""
    return sorted({scan.step for scan in study.scans})


def share_chart(study: Study) -> Chart:
    """Share memorized and mean score by checkpoint, a curve for each model."""
    measures = list(MEASURES)
    if not study.scored:
        measures.remove("mean score")
    views: dict[Key, View] = {}
    for first, measure in enumerate(measures):
        column, ends, suffix, scale = MEASURES[measure]
        value = "%{y:.4~g}" + suffix
        hover = f"{measure} {value}<br>checkpoint %{{x:,}}, %{{customdata:,}} rows"
        for second, selection in enumerate((SEEN, COMMON)):
            traces = []
            for number, name in enumerate(names_of(study)):
                lines = where(study.tables["shares"], model=name, selection=selection)
                # The interval of a count is that of the share.
                bars: tuple[str, str] | None = ends
                if column == "memorized":
                    bars = None
                label = escape(name, quote=False)
                trace = curve(label, number, lines, "step", column, bars, scale=scale, hover=hover)
                trace["customdata"] = [line["rows"] for line in lines]
                traces.append(trace)
            views[first, second] = View(
                traces,
                steps_axis(steps_of(study)),
                Axis(f"{measure} ({unit_of(measure)})", suffix=suffix, zero=True),
                empty="" if any(trace["x"] for trace in traces) else "No row was seen by all.",
            )
    return Chart(
        "Memorized rows by checkpoint",
        "",
        "A row is memorized where greedy decoding after its prompt makes the whole continuation."
        " Bars: 95% intervals (Wilson for shares), as if rows were independent.",
        views,
        (Choice("show", measures), Choice("of", (SEEN, COMMON))),
        wide=True,
    )


def unit_of(measure: str) -> str:
    """The unit of a measure in MEASURES."""
    units = {"share memorized": "% of rows", "rows memorized": "rows"}
    return units.get(measure, "share of the continuation")


def early_chart(study: Study) -> Chart | None:
    """Each checkpoint as a prediction of its model's last one; None without two checkpoints."""
    lines = where(study.tables["predictions"], kind="checkpoint")
    if not lines:
        return None
    views: dict[Key, View] = {}
    for first, quality in enumerate(QUALITIES):
        traces = [
            quality_curve(name, number, where(lines, predictor=name), quality, "predictor_step")
            for number, name in enumerate(names_of(study))
        ]
        steps = steps_axis([line["predictor_step"] for line in lines])
        axis = replace(steps, title=f"early {steps.title}")
        views[first,] = quality_view(traces, axis, quality)
    return Chart(
        "Does an early checkpoint tell what the last one memorizes?",
        "",
        "Recall: share of the rows memorized at the end that the early checkpoint already has."
        " Precision: share of the early checkpoint's that are still memorized at the end. Rows that"
        " both have seen.",
        views,
        (Choice("show", [WORDS.get(name, name) for name in QUALITIES]),),
    )


def small_chart(study: Study) -> Chart | None:
    """Each smaller model as a prediction of the largest; None without two sizes."""
    lines = where(study.tables["predictions"], kind="size")
    if not lines:
        return None
    sizes = {scan.file.name: scan.file.size for scan in study.scans}
    targets = [name for name in reversed(names_of(study)) if where(lines, target=name)]
    views: dict[Key, View] = {}
    for first, quality in enumerate(QUALITIES):
        for second, target in enumerate(targets):
            own = [
                {**line, "size": sizes[line["predictor"]]} for line in where(lines, target=target)
            ]
            steps = sorted({line["target_step"] for line in own})
            traces = [
                quality_curve(
                    f"step {step:,}", number, where(own, target_step=step), quality, "size"
                )
                for number, step in enumerate(steps)
            ]
            ticks = {line["size"]: escape(line["predictor"], quote=False) for line in own}
            axis = Axis(
                "the smaller model (by parameters)",
                is_wide(ticks),
                values=list(ticks),
                names=list(ticks.values()),
            )
            views[first, second] = quality_view(traces, axis, quality)
    return Chart(
        "Does a small model tell what a large one memorizes?",
        "",
        "At the same checkpoint. Recall: share of the large model's memorized rows that the small"
        " one has. Precision: share of the small model's that the large one has.",
        views,
        (
            Choice("show", [WORDS.get(name, name) for name in QUALITIES]),
            Choice("large model", targets),
        ),
    )


def quality_curve(
    name: str, number: int, lines: list[Line], quality: str, x: str
) -> dict[str, Any]:
    """A curve of one quality of predictions."""
    ends = None
    if quality in ("recall", "precision"):
        ends = (f"{quality}_low", f"{quality}_high")
    lines = sorted(lines, key=lambda line: line[x])
    hover = (
        f"{WORDS.get(quality, quality)} %{{y:.4~g}}%<br>%{{customdata[0]}} at"
        " %{customdata[1]:,} → %{customdata[2]} at %{customdata[3]:,}<br>both %{customdata[4]:,},"
        " predictor alone %{customdata[5]:,}, target alone %{customdata[6]:,} of"
        " %{customdata[7]:,} rows"
    )
    label = escape(name, quote=False)
    trace = curve(label, number, lines, x, quality, ends, scale=100, hover=hover)
    trace["customdata"] = [
        [
            escape(line["predictor"], quote=False),
            line["predictor_step"],
            escape(line["target"], quote=False),
            line["target_step"],
            line["true_positives"],
            line["false_positives"],
            line["false_negatives"],
            line["rows"],
        ]
        for line in lines
        if line[quality] is not None
    ]
    return trace


def quality_view(traces: list[dict[str, Any]], x: Axis, quality: str) -> View:
    """A view of curves in percent."""
    traces = [trace for trace in traces if trace["x"]]
    word = WORDS.get(quality, quality)
    empty = ""
    if not traces:
        empty = f"No {word}: no row is memorized where it would be a share of them."
    return View(traces, x, Axis(f"{word} (%)", suffix="%", zero=True), empty=empty)


def correlation_chart(study: Study) -> Chart | None:
    """Heat maps between models and between checkpoints; None for one scan."""
    lines = study.tables["correlations"]
    if not lines:
        return None
    options: list[str] = []
    squares: list[tuple[list[tuple[str, int]], list[str], str]] = []
    for step in reversed(steps_of(study)):
        names = [scan.file.name for scan in study.scans if scan.step == step]
        if len(names) > 1:
            options.append(f"models at checkpoint {step:,}")
            squares.append(([(name, step) for name in names], names, "model"))
    for name in names_of(study):
        steps = [scan.step for scan in study.scans if scan.file.name == name]
        if len(steps) > 1:
            options.append(f"checkpoints of {name}")
            labels = [f"{step:,}" for step in steps]
            squares.append(([(name, step) for step in steps], labels, "checkpoint"))
    cells = cells_of(lines)
    views: dict[Key, View] = {
        (first, second): heat_view(scans, labels, title, cells[rows, measure])
        for first, (scans, labels, title) in enumerate(squares)
        for second, (rows, measure, _) in enumerate(SELECTIONS)
    }
    return Chart(
        "Correlation of scores",
        "",
        "Over the rows that both have seen. Top: the rows with the highest sum of both scores; such"
        " a choice lowers a correlation, so compare its cells with each other.",
        views,
        (
            Choice("between", options),
            Choice("rows", [name for *_, name in SELECTIONS]),
        ),
    )


Cells = dict[tuple[tuple[str, int], tuple[str, int]], tuple[float | None, int]]
"""Correlation and rows by pair of scans, in both orders."""


def cells_of(lines: list[dict[str, Any]]) -> dict[tuple[str, str], Cells]:
    """The cells by selection of rows and measure."""
    cells: dict[tuple[str, str], Cells] = defaultdict(dict)
    for line in lines:
        a = (line["a"], line["a_step"])
        b = (line["b"], line["b_step"])
        value = (line["correlation"], line["rows"])
        for pair in ((a, b), (b, a)):
            cells[line["selection"], line["measure"]][pair] = value
    return cells


def heat_view(scans: list[tuple[str, int]], labels: list[str], title: str, cells: Cells) -> View:
    """A square of correlations."""
    size = range(len(scans))
    values: list[list[float | None]] = [[None] * len(scans) for _ in size]
    rows = [[0] * len(scans) for _ in size]
    for i in size:
        for j in size:
            if i != j:
                values[i][j], rows[i][j] = cells.get((scans[i], scans[j]), (None, 0))
    known = [value for line in values for value in line if value is not None]
    # Names that are numbers would be placed by value; in front of them stands nothing visible.
    marks = [f"\u200b{escape(label, quote=False)}" for label in labels]
    scale = [[0, "--card"], [1, "--c0"]]
    if known and min(known) < 0:
        scale = [[0, "--c1"], [0.5, "--card"], [1, "--c0"]]
    trace = {
        "type": "heatmap",
        "x": marks,
        "y": marks,
        "z": values,
        "text": [["" if v is None else f"{v:.2f}" for v in line] for line in values],
        "customdata": rows,
        "texttemplate": "%{text}" if len(scans) <= 12 else "",
        "colorscale": scale,
        "zmin": -1 if len(scale) > 2 else 0,
        "zmax": 1,
        "xgap": 2,
        "ygap": 2,
        "hoverongaps": False,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": ""}},
        "hovertemplate": "%{y} and %{x}: <b>%{z:.4f}</b><br>%{customdata:,} rows<extra></extra>",
    }
    empty = ""
    if not known:
        empty = "No correlation: a score is the same in all these rows."
    return View([trace], Axis(title), Axis(""), kind="heat", empty=empty)
