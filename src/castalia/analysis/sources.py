"""The panels by source: losses, bits per byte, and the mixture's shares and epochs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from castalia.analysis.axes import extremes, spans
from castalia.analysis.html import NONE
from castalia.analysis.panel import Kind, Panel, Series, look
from castalia.analysis.runs import Curve, RunFiles, Vector, curve, inner
from castalia.analysis.smoothing import ending
from castalia.mixing import MixtureRecord

MANY = 30
"""Number of sources above which a heat map replaces the stacked area."""
SHARE_DETAIL = 150
"""Shares are means over spans of 1/150 of the step, and of single steps before step 150."""
MOST_LINES = 12
"""Number of sources whose curves are switched on at first: those with the largest mean share."""
POINTS = 8000
"""Steps that are drawn one by one in the curves of a panel by source, all together."""

HEADER = ["source", "prior", "mean", "last", "moved", "rows", "epochs", "loss at the end"]
"""Columns of the table of sources."""


def source_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """The panels by source of all runs; those without a curve are left out."""
    panels = [
        loss_panel(runs),
        *(shares_panel(runs, place) for place in range(len(runs))),
        epochs_panel(runs),
        distance_panel(runs),
        Panel(
            "Validation loss by source",
            "nats per token",
            "On the validation rows of each source.",
            by_source(runs, "valid_sources", "loss", marks=True),
        ),
        Panel(
            "Validation bits per byte by source",
            "bits per byte",
            "The validation loss over the UTF-8 bytes of the text, which is comparable between"
            " tokenizers.",
            by_source(runs, "valid_sources", "bits_per_byte", marks=True),
        ),
        bits_panel(runs),
    ]
    few = largest_sources(runs)
    shown: list[Panel] = []
    for panel in panels:
        if panel is None or not panel.series:
            continue
        if has_many(panel):
            panel = replace(panel, few=few)
        shown.append(panel)
    return shown


def has_many(panel: Panel) -> bool:
    """Whether a panel has more lines than can be told apart."""
    names = {series.name for series in panel.series}
    return panel.kind == "lines" and len(names) > MOST_LINES


def largest_sources(runs: Sequence[RunFiles]) -> list[str]:
    """The sources whose curves are switched on at first: all, or of many the largest."""
    names = source_names(runs)
    if len(names) <= MOST_LINES:
        return []
    shares = dict.fromkeys(names, 0.0)
    for run in runs:
        if run.mixture is not None:
            for name, share in zip(run.mixture.sources, run.mixture.mean_weights(), strict=True):
                shares[name] += float(share)
    # Stable: without a mixture, the first ones.
    return sorted(names, key=lambda name: -shares[name])[:MOST_LINES]


def source_names(runs: Sequence[RunFiles]) -> list[str]:
    """Every source of the runs. Its place is its colour, the same in all panels."""
    return list(dict.fromkeys(name for run in runs for name in run.sources))


def of_source(
    name: str,
    place: int,
    points: Curve,
    names: list[str],
    *,
    marks: bool = False,
    smoothed: bool = True,
) -> Series:
    """A source's curve in the run at `place`: the colour tells the source, the dash the run."""
    return Series(name, place, points, marks, smoothed, names.index(name), place)


def by_source(runs: Sequence[RunFiles], key: str, value: str, *, marks: bool) -> list[Series]:
    """A curve for each source and run of `{key: {source: {value: number}}}` in the lines."""
    series: list[Series] = []
    names = source_names(runs)
    for name in names:
        for place, run in enumerate(runs):
            points = run.curve(key, name, value)
            if len(points[0]):
                series.append(of_source(name, place, points, names, marks=marks))
    return series


def loss_panel(runs: Sequence[RunFiles]) -> Panel:
    """Training loss by source, from the metrics, else from the mixture's record."""
    series = by_source(runs, "sources", "loss", marks=False)
    names = source_names(runs)
    for place, run in enumerate(runs):
        if run.mixture is not None and not any(each.run == place for each in series):
            series += recorded_losses(run.mixture, place, names)
    return Panel(
        "Loss by source",
        "nats per token",
        "Training loss on the rows of each source in a step.",
        series,
        detail=max(200, POINTS // max(1, len(series))),
    )


def recorded_losses(record: MixtureRecord, place: int, names: list[str]) -> list[Series]:
    """The losses of a mixture's record, a curve a source."""
    series: list[Series] = []
    for i, name in enumerate(record.sources):
        points = [(step, (line.get("loss") or {i: None})[i]) for step, line in record.lines.items()]
        series.append(of_source(name, place, curve(points), names))
    return [each for each in series if len(each.curve[0])]


def shares_panel(runs: Sequence[RunFiles], place: int) -> Panel | None:
    """The shares of a run's sources: a stacked area, or a heat map of many sources."""
    record = runs[place].mixture
    if record is None:
        return None
    steps, shares = span_means(np.array(record.steps, np.float64), record.weights())
    many = len(record.sources) > MANY
    names = source_names(runs)
    order = np.arange(len(record.sources))
    # Areas keep the order of their colours; in a heat map the rows that matter stand on top.
    if many:
        order = np.argsort(-shares.mean(axis=0), kind="stable")
    series: list[Series] = []
    for i in order.tolist():
        name = record.sources[i]
        points = (steps, 100 * shares[:, i])
        series.append(of_source(name, place, points, names, smoothed=False))
    title = "Mixture"
    if len(runs) > 1:
        title += f" of {runs[place].name}"
    kind: Kind = "heat" if many else "shares"
    return Panel(title, "% of rows", about(record), series, kind=kind, wide=many)


def about(record: MixtureRecord) -> str:
    """A description of the mixer."""
    kind = innermost(record.header["mixer"])
    lag = record.header["lag"]
    until = "the step"
    if lag:
        until = f"{lag + 1} steps"
    return f"{len(record.sources)} sources mixed by {kind}; losses count up to {until} before."


def innermost(mixer: dict[str, Any]) -> str:
    """The name of the mixer inside its wrappers."""
    while mixer.get("inner"):
        mixer = mixer["inner"][0]
    return str(mixer["kind"])


def span_means(steps: Vector, shares: Vector) -> tuple[Vector, Vector]:
    """The last step of each span and the mean shares (C, K) over it."""
    starts = np.flatnonzero(np.diff(spans(steps, SHARE_DETAIL), prepend=-1))
    counts = np.diff(np.append(starts, len(steps)))
    means = np.add.reduceat(shares, starts, axis=0) / counts[:, None]
    # The shares hold up to the last step of their span.
    return steps[starts + counts - 1], means


def epochs_panel(runs: Sequence[RunFiles]) -> Panel:
    """Passes over each source up to and including each step."""
    series: list[Series] = []
    names = source_names(runs)
    for place, run in enumerate(runs):
        if run.mixture is None:
            continue
        steps = np.array(run.mixture.steps, np.float64)
        epochs = passes(run.mixture)
        for i, name in enumerate(run.mixture.sources):
            shown = extremes(steps, epochs[:, i], SHARE_DETAIL)
            points = (steps[shown], epochs[shown, i])
            series.append(of_source(name, place, points, names, smoothed=False))
    return Panel("Passes over each source", "epochs", "Rows read over rows there are.", series)


def passes(record: MixtureRecord) -> Vector:
    """(S, K) passes over each source up to and including each recorded step."""
    # Empty sources read nothing: 0 / 1 epochs.
    sizes = np.maximum(np.array(record.header["sizes"], np.float64), 1)
    return np.array([(line["read"] + line["counts"]) / sizes for line in record.lines.values()])


def distance_panel(runs: Sequence[RunFiles]) -> Panel:
    """How far the mixture is from its prior, and how much of it ignores learning."""
    series: list[Series] = []
    names = (("distance", "distance to the prior"), ("uniform_share", "uniform share"))
    for number, (key, name) in enumerate(names):
        colour, dash = look(number, len(runs))
        for place, run in enumerate(runs):
            if run.mixture is None:
                continue
            points = curve((step, line.get(key)) for step, line in run.mixture.lines.items())
            if len(points[0]):
                series.append(Series(name, place, points, smoothed=False, colour=colour, dash=dash))
    return Panel(
        "Distance to the prior",
        "",
        "Total variation between the weights and the prior; for bandits also the share that is"
        " mixed uniformly whatever was learned.",
        series,
    )


def bits_panel(runs: Sequence[RunFiles]) -> Panel:
    """Bits per byte of held-out text at the checkpoints, from evals/bits_per_byte.json."""
    series: list[Series] = []
    names = source_names(runs)
    for name in names:
        for place, run in enumerate(runs):
            points = curve(
                (mark["step"], inner(mark, ("sources", name, "bits_per_byte"))) for mark in run.bits
            )
            if len(points[0]):
                series.append(of_source(name, place, points, names, marks=True))
    return Panel(
        "Bits per byte by source",
        "bits per byte",
        "Held-out documents of each source at every checkpoint. Lower is better; 8 means no"
        " compression.",
        series,
    )


def mixture_rows(run: RunFiles) -> list[list[str]]:
    """One row per source of a mixed run, under `HEADER`; shares in percent, `moved` in points."""
    record = run.mixture
    if record is None:
        return []
    # Records without a prior in the header start at it.
    prior = record.header.get("prior") or record.weights()[0].tolist()
    mean = record.mean_weights()
    last = record.weights()[-1]
    end = list(record.lines.values())[-1]
    read = end["read"] + end["counts"]
    epochs = passes(record)[-1]
    losses = {series.name: ending(*series.curve)[0] for series in loss_panel([run]).series}
    rows: list[list[str]] = []
    for i, name in enumerate(record.sources):
        cells = [f"{prior[i]:.2%}", f"{mean[i]:.2%}", f"{last[i]:.2%}"]
        cells += [f"{100 * (last[i] - prior[i]):+.2f}", f"{read[i]:,}", f"{epochs[i]:.2f}"]
        cells.append(f"{losses[name]:.3f}" if name in losses else NONE)
        rows.append([name, *cells])
    return rows
