"""Charts of each scan: scores by place, windows of the order, histograms, losses."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from castalia.memorization.analyses.study import Study
from castalia.studies.memorization.chart import (
    Axis,
    Chart,
    Choice,
    Key,
    Line,
    Trace,
    View,
    band,
    colour,
    curve,
    short,
    steps_axis,
    where,
)
from castalia.studies.memorization.comparisons import names_of, steps_of

NO_ROWS = "No row is memorized in complete windows of the order, so their density has no shape."


def position_chart(study: Study) -> Chart:
    """Mean score in buckets of the order, with the regression line."""
    columns = {
        "mean score": ("mean_score", "mean_low", "mean_high", "", 1.0),
        "share memorized": ("share", "share_low", "share_high", "%", 100.0),
    }
    if not study.scored:
        del columns["mean score"]
    steps = list(reversed(steps_of(study)))
    views: dict[Key, View] = {}
    for first, (title, (column, low, high, suffix, scale)) in enumerate(columns.items()):
        for second, step in enumerate(steps):
            traces: list[Trace] = []
            for number, name in enumerate(names_of(study)):
                lines = where(study.tables["positions"], model=name, step=step)
                if not lines:
                    continue
                x = [line["middle"] for line in lines]
                ends = [
                    [line[end] if line[end] is not None else line[column] for line in lines]
                    for end in (low, high)
                ]
                traces.append(
                    band(name, number, x, *([v * scale for v in values] for values in ends))
                )
                hover = (
                    f"{title} %{{y:.4~g}}{suffix}<br>about row %{{x:,.0f}}, %{{customdata:,}} rows"
                )
                label = escape(name, quote=False)
                trace = curve(label, number, lines, "middle", column, scale=scale, hover=hover)
                trace["marker"]["size"] = 4
                trace["customdata"] = [line["rows"] for line in lines]
                traces.append(trace)
            unit = "share of the continuation"
            if suffix:
                unit = "% of rows"
            views[first, second] = View(
                traces,
                Axis("place in the order of training (rows)"),
                Axis(f"{title} ({unit})", suffix=suffix, zero=True),
            )
    return Chart(
        "Score against the place in training",
        "",
        "Means of buckets of consecutive rows with 95% intervals. A curve that rises to the right"
        " says that rows seen lately are remembered better.",
        views,
        (
            Choice("show", list(columns)),
            Choice("checkpoint", [f"{step:,}" for step in steps]),
        ),
        wide=True,
    )


def slope_chart(study: Study) -> Chart:
    """The slope of the regression by checkpoint."""
    traces = []
    for number, name in enumerate(names_of(study)):
        lines = where(study.tables["slopes"], model=name)
        hover = (
            "%{y:.4~g} per million rows<br>checkpoint %{x:,}<br>%{customdata:.3~g}% of the mean"
            " score from the first row to the last"
        )
        label = escape(name, quote=False)
        ends = ("slope_low", "slope_high")
        trace = curve(label, number, lines, "step", "slope_per_million", ends, hover=hover)
        trace["customdata"] = [
            None if line["change"] is None else 100 * line["change"] for line in lines
        ]
        traces.append(trace)
    empty = "A line needs three rows."
    if any(trace["x"] for trace in traces):
        empty = ""
    return Chart(
        "Slope of the score over the order",
        "",
        "Least squares of the score on the place, with 95% intervals (Student's t). An interval"
        " about 0 shows no trend.",
        {
            (): View(
                traces,
                steps_axis(steps_of(study)),
                Axis("slope (score per million rows)"),
                empty=empty,
            )
        },
    )


def per_scan(
    study: Study, table: str, view: Callable[[list[Line]], View]
) -> tuple[dict[Key, View], tuple[Choice, Choice]]:
    """A view of each scan, and the menus of models and checkpoints."""
    names = names_of(study)
    steps = steps_of(study)
    views: dict[Key, View] = {
        (first, second): view(where(study.tables[table], model=name, step=step))
        for first, name in enumerate(names)
        for second, step in enumerate(steps)
    }
    last = study.scans[-1]
    choices = (
        Choice("model", names, names.index(last.file.name)),
        Choice("checkpoint", [f"{step:,}" for step in steps], steps.index(last.step)),
    )
    return views, choices


def quantile_chart(study: Study) -> Chart:
    """The Poisson Q-Q plot of each scan."""
    views, choices = per_scan(study, "density_quantiles", quantile_view)
    return Chart(
        "Do memorized rows come at random?",
        "",
        "Quantiles of the number of memorized rows in a window of consecutive rows, against those"
        " of Poisson's distribution of the same rate. On the line: places of memorized rows are"
        " random. Above it on the right: they cluster.",
        views,
        choices,
    )


def quantile_view(lines: Sequence[Line]) -> View:
    """One Q-Q plot: a mark has the more area the more windows it stands for."""
    axes = (
        Axis("Poisson's quantile (memorized rows in a window)", zero=True),
        Axis("memorized rows in a window", zero=True),
    )
    if not lines:
        return View([], *axes, empty=NO_ROWS)
    most = max(line["windows"] for line in lines)
    end = max(max(line["poisson"], line["memorized"]) for line in lines)
    points: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "windows",
        "x": [line["poisson"] for line in lines],
        "y": [line["memorized"] for line in lines],
        "customdata": [line["windows"] for line in lines],
        "marker": {
            "size": [short(6 + 16 * (line["windows"] / most) ** 0.5) for line in lines],
            "color": colour(0, 0.65),
            "line": {"color": colour(0), "width": 1},
        },
        "hovertemplate": "<b>%{y}</b>, Poisson %{x}<br>%{customdata:,} windows<extra></extra>",
    }
    diagonal: Trace = {
        "type": "scatter",
        "mode": "lines",
        "name": "Poisson",
        "x": [0, end],
        "y": [0, end],
        "line": {"color": colour(1), "width": 2, "dash": "dash"},
        "hoverinfo": "skip",
    }
    return View([diagonal, points], *axes)


def window_chart(study: Study) -> Chart:
    """The number of memorized rows in windows, beside Poisson's expectation."""
    tests = {(line["model"], line["step"]): line for line in study.tables["densities"]}

    def view(lines: Sequence[Line]) -> View:
        return window_view(lines, tests)

    views, choices = per_scan(study, "density_counts", view)
    return Chart(
        "Memorized rows in a window",
        "",
        "Windows of the order by their number of memorized rows, and Poisson's expectation. D is"
        " the index of dispersion, variance over mean: 1 under Poisson, more for clusters, less for"
        " an even spread; p is two-sided.",
        views,
        choices,
    )


def window_view(lines: Sequence[Line], tests: Mapping[tuple[str, int], Line]) -> View:
    """One histogram; the legend has the test."""
    if not lines or not any(line["memorized"] and line["windows"] for line in lines):
        return View([], Axis(""), Axis(""), empty=NO_ROWS)
    test = tests[lines[0]["model"], lines[0]["step"]]
    x = [line["memorized"] for line in lines]
    found = "found"
    if test["dispersion"] is not None:
        found += f" (D = {test['dispersion']:.3g}, p = {test['p_value']:.2g})"
    bars: Trace = {
        "type": "bar",
        "name": found,
        "x": x,
        "y": [line["windows"] for line in lines],
        "marker": {"color": colour(0, 0.75)},
        "hovertemplate": "<b>%{y:,}</b> windows with %{x}<extra></extra>",
    }
    expected: Trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"Poisson, {test['rate']:.3g} a window",
        "x": x,
        "y": [short(line["expected"]) for line in lines],
        "line": {"color": colour(1), "width": 2},
        "marker": {"size": 5, "color": colour(1)},
        "hovertemplate": "Poisson: <b>%{y:,.4~g}</b> windows with %{x}<extra></extra>",
    }
    return View(
        [bars, expected],
        Axis(f"memorized rows in a window of {test['window']} rows"),
        Axis("windows", zero=True),
    )


def by_model(
    study: Study, traces_of: Callable[[str, int, list[Line]], list[Trace]], x: Axis, y: Axis
) -> tuple[dict[Key, View], tuple[Choice]]:
    """Views by checkpoint of the levels of all models."""
    steps = list(reversed(steps_of(study)))
    views: dict[Key, View] = {}
    for place, step in enumerate(steps):
        traces: list[Trace] = []
        for number, name in enumerate(names_of(study)):
            lines = [
                line
                for line in where(study.tables["levels"], model=name, step=step)
                if line["rows"]
            ]
            traces += traces_of(escape(name, quote=False), number, lines)
        views[place,] = View(traces, x, y, empty="" if traces else "No losses were scanned.")
    return views, (Choice("checkpoint", [f"{step:,}" for step in steps]),)


def histogram_chart(study: Study) -> Chart:
    """How many rows have each score."""

    def traces_of(name: str, number: int, lines: list[Line]) -> list[Trace]:
        hover = "score %{x:.4~g}: %{y:,} rows"
        trace = curve(name, number, lines, "score", "rows", hover=hover)
        # To the row: these are counts.
        trace["y"] = [line["rows"] for line in lines]
        trace["marker"]["size"] = 5
        if lines:
            return [trace]
        return []

    x = Axis("score (share of the continuation that is made)")
    views, choices = by_model(study, traces_of, x, Axis("rows", log=True))
    return Chart(
        "Rows at each score",
        "",
        "A logarithmic axis: the last mark on the right are the memorized rows.",
        views,
        choices,
    )


def loss_chart(study: Study) -> Chart:
    """The loss of the continuation at each score."""

    def traces_of(name: str, number: int, lines: list[Line]) -> list[Trace]:
        known = [line for line in lines if line["loss_50"] is not None]
        if not known:
            return []
        x = [line["score"] for line in known]
        ends = ([line[end] for line in known] for end in ("loss_10", "loss_90"))
        hover = "score %{x:.4~g}<br>median loss %{y:.3~f}, mean %{customdata[0]:.3~f} nats"
        trace = curve(name, number, known, "score", "loss_50", hover=hover)
        trace["customdata"] = [[line["mean_loss"], line["rows"]] for line in known]
        trace["marker"]["size"] = 5
        return [band(name, number, x, *ends), trace]

    x = Axis("score (share of the continuation that is made)")
    y = Axis("loss of the continuation (nats per token)", zero=True)
    views, choices = by_model(study, traces_of, x, y)
    return Chart(
        "Loss of the continuation against the score",
        "",
        "Medians, and the range from the 10th to the 90th percentile. The loss is that of the true"
        " continuation; the score compares it with what the model writes.",
        views,
        choices,
    )


def dose_chart(study: Study) -> Chart | None:
    """Share memorized by the copies of a text in the data; None without the stream."""
    if not study.tables["doses"]:
        return None
    steps = list(reversed(steps_of(study)))
    copies = sorted({line["copies"] for line in study.tables["doses"]})
    axis = Axis(
        "copies of the text in the data", log=True, values=copies if len(copies) < 9 else ()
    )
    views: dict[Key, View] = {}
    for place, step in enumerate(steps):
        traces = []
        for number, name in enumerate(names_of(study)):
            lines = where(study.tables["doses"], model=name, step=step)
            hover = (
                "%{y:.4~g}% memorized<br>%{x:,} to %{customdata[0]:,} copies,"
                " %{customdata[1]:,} rows"
            )
            ends = ("share_low", "share_high")
            label = escape(name, quote=False)
            trace = curve(label, number, lines, "copies", "share", ends, scale=100, hover=hover)
            trace["customdata"] = [[line["copies_to"], line["rows"]] for line in lines]
            traces.append(trace)
        views[place,] = View(
            traces, axis, Axis("share memorized (% of rows)", suffix="%", zero=True)
        )
    return Chart(
        "Repetition and memorization",
        "",
        "Rows whose prompt and continuation lie in one document, by the number of documents of the"
        " same text in its source, in powers of two. 95% intervals (Wilson).",
        views,
        (Choice("checkpoint", [f"{step:,}" for step in steps]),),
        wide=True,
    )
