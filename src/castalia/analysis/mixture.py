"""The report's part about a mixture: what `mixture.jsonl` says of weights, losses and epochs by source."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.analysis.areas import columns, heat_map, stacked_area
from castalia.analysis.html import section, table
from castalia.analysis.svg import Series, line_chart, number
from castalia.mixing import MixtureRecord, read_mixture

MANY = 30
"""With more sources than this a heat map stands in place of the stacked area."""
LINES = 10
"""Sources that have a line of their own, those with the largest mean share."""
POINTS = 120


def mixture_section(run: Path) -> str:
    """The section of a run's folder; empty without a record or its first step."""
    path = run / "mixture.jsonl"
    record = read_mixture(path) if path.exists() else None
    if record is None or not record.lines:
        return ""
    names, steps, shares = record.sources, record.steps, record.weights()
    picture = heat_map if len(names) > MANY else stacked_area
    shown = sorted(
        np.argsort(-shares.mean(axis=0), kind="stable")[:LINES].tolist()
    )  # in the colours of the areas
    parts = [
        picture(names, steps, shares, title="Share of each source by step"),
        "<h3>Loss by source</h3>",
        by_source(record, losses(record), shown, "nats per token", "Training loss by source"),
        "<h3>Passes over each source</h3>",
        by_source(record, epochs(record), shown, "epochs", "Epochs by source"),
        "<h3>Distance to the prior, and the share mixed uniformly whatever was learned</h3>",
        exploration(record),
        table(HEADER, rows(record)),
    ]
    return section("Mixture", about(record), "".join(parts))


HEADER = [
    "source",
    "at first",
    "mean",
    "last",
    "moved",
    "rows",
    "epochs",
    "first loss",
    "last loss",
]


def about(record: MixtureRecord) -> str:
    """The mixer in a sentence."""
    settings = innermost(record.header["mixer"])
    more = f", the {LINES} largest drawn as lines" if len(record.sources) > LINES else ""
    lag = record.header["lag"]
    return (
        f"{len(record.sources)} sources mixed by {settings}{more}. A step follows the losses up to {lag + 1} steps"
        " before it. The loss is that of the rows of each step, smoothed."
    )


def innermost(mixer: dict[str, Any]) -> str:
    """The name of the mixer within what is put around it."""
    while mixer.get("inner"):
        mixer = mixer["inner"][0]
    return str(mixer["kind"])


def losses(record: MixtureRecord) -> NDArray[np.float64]:
    """(S, K) running means of the training loss; NaN before a source's first row, or where none was recorded."""
    width, mean = len(record.sources), np.full(len(record.sources), np.nan)
    out = np.empty((len(record.lines), width))
    for place, line in enumerate(record.lines.values()):
        now = np.array(line.get("loss") or [None] * width, np.float64)
        mean = np.where(np.isnan(now), mean, np.where(np.isnan(mean), now, 0.9 * mean + 0.1 * now))
        out[place] = mean
    return out


def epochs(record: MixtureRecord) -> NDArray[np.float64]:
    """(S, K) passes over each source, the step itself included."""
    sizes = np.maximum(np.array(record.header["sizes"], np.float64), 1)
    return np.array([(line["read"] + line["counts"]) / sizes for line in record.lines.values()])


def by_source(
    record: MixtureRecord, values: NDArray[np.float64], shown: list[int], y_label: str, title: str
) -> str:
    """A line for each of the sources shown."""
    steps, thinned = columns(record.steps, values, POINTS)
    lines = [
        Series(record.sources[i], list(zip(steps.tolist(), thinned[:, i].tolist(), strict=True)))
        for i in shown
    ]
    return line_chart(lines, x_label="step", y_label=y_label, title=title)


def exploration(record: MixtureRecord) -> str:
    """The distance to the prior, and the share that is mixed uniformly whatever was learned."""
    named = {"to the prior": "distance", "uniform share": "uniform_share"}
    lines = []
    for name, key in named.items():
        there = [(step, line[key]) for step, line in record.lines.items() if key in line]
        if there:
            steps, values = columns(
                [s for s, _ in there], np.array([[v] for _, v in there]), POINTS
            )
            lines.append(
                Series(name, list(zip(steps.tolist(), values[:, 0].tolist(), strict=True)))
            )
    return line_chart(
        lines, x_label="step", y_label="share", title="Distance to the prior and uniform share"
    )


def rows(record: MixtureRecord) -> list[list[str]]:
    """A row a source: its prior, mean and last share, what was read of it, and its loss then and now."""
    prior = record.header.get("prior") or record.weights()[0].tolist()
    mean, last = record.mean_weights(), record.weights()[-1]
    smooth, passes = losses(record), epochs(record)[-1]
    end = list(record.lines.values())[-1]
    read = end["read"] + end["counts"]
    return [
        [
            name,
            f"{prior[i]:.2%}",
            f"{mean[i]:.2%}",
            f"{last[i]:.2%}",
            f"{100 * (last[i] - prior[i]):+.2f}",
            number(float(read[i])),
            f"{passes[i]:.2f}",
            *first_and_last(smooth[:, i]),
        ]
        for i, name in enumerate(record.sources)
    ]


def first_and_last(values: NDArray[np.float64]) -> tuple[str, str]:
    """The first and the last value that is there, as text."""
    there = values[np.isfinite(values)]
    return (f"{there[0]:.3f}", f"{there[-1]:.3f}") if len(there) else ("–", "–")
