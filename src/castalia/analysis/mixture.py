"""The report's section on a mixture: weights, losses and epochs by source, from mixture.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.analysis.areas import columns, heat_map, stacked_area
from castalia.analysis.html import section, table
from castalia.analysis.svg import Series, line_chart, number
from castalia.mixing import MixtureRecord, read_mixture

MANY = 30
"""Number of sources above which a heat map replaces the stacked area."""
LINES = 10
"""Number of sources drawn as lines: those with the largest mean share."""
POINTS = 120
"""Points of a line."""
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


def mixture_section(run: Path) -> str:
    """The section of a run's folder; empty without a record or a recorded step."""
    path = run / "mixture.jsonl"
    if not path.exists():
        return ""
    record = read_mixture(path)
    if not record.lines:
        return ""
    shares = record.weights()
    picture = heat_map if len(record.sources) > MANY else stacked_area
    # Sorted, so that lines have the colours of the areas.
    shown = sorted(np.argsort(-shares.mean(axis=0), kind="stable")[:LINES].tolist())
    parts = [
        picture(record.sources, record.steps, shares, title="Share of each source by step"),
        "<h3>Loss by source</h3>",
        by_source(record, losses(record), shown, "nats per token", "Training loss by source"),
        "<h3>Passes over each source</h3>",
        by_source(record, epochs(record), shown, "epochs", "Epochs by source"),
        "<h3>Distance to the prior, and the share mixed uniformly regardless of learning</h3>",
        exploration(record),
        table(HEADER, rows(record)),
    ]
    return section("Mixture", about(record), "".join(parts))


def about(record: MixtureRecord) -> str:
    """A description of the mixer."""
    kind = innermost(record.header["mixer"])
    more = ""
    if len(record.sources) > LINES:
        more = f"; the {LINES} largest are drawn as lines"
    lag = record.header["lag"]
    return (
        f"{len(record.sources)} sources mixed by {kind}{more}. A step follows the losses up to"
        f" {lag + 1} steps before it. The loss is that of the rows of each step, smoothed."
    )


def innermost(mixer: dict[str, Any]) -> str:
    """The name of the mixer inside its wrappers."""
    while mixer.get("inner"):
        mixer = mixer["inner"][0]
    return str(mixer["kind"])


def losses(record: MixtureRecord) -> NDArray[np.float64]:
    """(S, K) running means of the training loss; NaN until a source's first recorded loss."""
    width = len(record.sources)
    mean = np.full(width, np.nan)
    out = np.empty((len(record.lines), width))
    for place, line in enumerate(record.lines.values()):
        now = np.array(line.get("loss") or [None] * width, np.float64)
        running = np.where(np.isnan(mean), now, 0.9 * mean + 0.1 * now)
        mean = np.where(np.isnan(now), mean, running)
        out[place] = mean
    return out


def epochs(record: MixtureRecord) -> NDArray[np.float64]:
    """(S, K) passes over each source up to and including each step."""
    # Empty sources read nothing: 0 / 1 epochs.
    sizes = np.maximum(np.array(record.header["sizes"], np.float64), 1)
    return np.array([(line["read"] + line["counts"]) / sizes for line in record.lines.values()])


def by_source(
    record: MixtureRecord, values: NDArray[np.float64], shown: list[int], y_label: str, title: str
) -> str:
    """A chart of (S, K) values with a line for each source shown."""
    steps, thinned = columns(record.steps, values, POINTS)
    lines: list[Series] = []
    for i in shown:
        points = list(zip(steps.tolist(), thinned[:, i].tolist(), strict=True))
        lines.append(Series(record.sources[i], points))
    return line_chart(lines, x_label="step", y_label=y_label, title=title)


def exploration(record: MixtureRecord) -> str:
    """A chart of the distance to the prior and, for bandits, of the share mixed uniformly."""
    lines: list[Series] = []
    for name, key in (("to the prior", "distance"), ("uniform share", "uniform_share")):
        recorded = {step: line[key] for step, line in record.lines.items() if key in line}
        if recorded:
            values = np.array(list(recorded.values()), np.float64)[:, None]
            steps, thinned = columns(list(recorded), values, POINTS)
            points = list(zip(steps.tolist(), thinned[:, 0].tolist(), strict=True))
            lines.append(Series(name, points))
    return line_chart(
        lines, x_label="step", y_label="share", title="Distance to the prior and uniform share"
    )


def rows(record: MixtureRecord) -> list[list[str]]:
    """One table row per source, under `HEADER`."""
    # Records without a prior in the header start at it.
    prior = record.header.get("prior") or record.weights()[0].tolist()
    mean = record.mean_weights()
    last = record.weights()[-1]
    smooth = losses(record)
    passes = epochs(record)[-1]
    end = list(record.lines.values())[-1]
    read = end["read"] + end["counts"]
    out: list[list[str]] = []
    for i, name in enumerate(record.sources):
        out.append(
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
        )
    return out


def first_and_last(values: NDArray[np.float64]) -> tuple[str, str]:
    """The first and the last finite value as text."""
    recorded = values[np.isfinite(values)]
    if not len(recorded):
        return "–", "–"
    return f"{recorded[0]:.3f}", f"{recorded[-1]:.3f}"
