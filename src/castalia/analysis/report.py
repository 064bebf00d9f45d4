"""`report.html`: a run on one page, made from the files in the run's folder.

Each of these files is optional: `metrics.jsonl`, `mixture.jsonl`, `evals/bits_per_byte.json`,
`samples/samples.json`, `summary.json` (title, lead, tiles, tables), `config.yaml`, `env.json`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from castalia.analysis.html import section, table
from castalia.analysis.mixture import mixture_section
from castalia.analysis.style import STYLE
from castalia.analysis.svg import Series, line_chart, number
from castalia.core.errors import DataError
from castalia.core.files import atomic_write
from castalia.monitor.sinks import read_metrics

MOST_POINTS = 400
"""Points of the loss curve; longer runs are averaged over spans of equal width on the axis."""
SMOOTHING = 8
"""The mean curve averages over the last step / SMOOTHING steps, at least one."""


def read_json(path: Path) -> Any:
    """The JSON value in a file; None if the file is missing.

    Raises  DataError if the file is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; delete it and create it again") from None


def thin(
    points: Sequence[tuple[float, float]], most: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """Average x and y over spans of equal width in log(1 + x), to at most `most` points."""
    if len(points) <= most:
        return list(points)
    spans: dict[int, list[tuple[float, float]]] = {}
    width = math.log1p(points[-1][0]) / (most - 1) or 1.0
    for point in points:
        spans.setdefault(int(math.log1p(point[0]) / width), []).append(point)
    means: list[tuple[float, float]] = []
    for span in spans.values():
        mean_x = sum(x for x, _ in span) / len(span)
        mean_y = sum(y for _, y in span) / len(span)
        means.append((mean_x, mean_y))
    return means


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean whose memory grows with the step, which keeps the steep start sharp."""
    out: list[tuple[float, float]] = []
    if not points:
        return out
    mean = points[0][1]
    for x, y in points:
        mean += (y - mean) / max(1.0, x / SMOOTHING)
        out.append((x, mean))
    return out


def loss_section(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The training loss by step: each step, and the mean."""
    points = [(float(m["step"]), float(m["loss"])) for m in metrics if m.get("loss") is not None]
    if not points:
        return ""
    # The mean is smooth, so a third of the points draws it.
    lines = [Series("each step", thin(points), True), Series("mean", thin(smooth(points), 120))]
    chart = line_chart(
        lines, x_label="step", y_label="nats per token", title="Training loss by step", log_x=True
    )
    about = (
        "Cross-entropy on the rows of each step; the bold line is its mean. It ended at"
        f" {smooth(points)[-1][1]:.3f} nats per token after step {number(points[-1][0])}."
    )
    return section("Training loss", about, chart)


def bits_section(evals: Mapping[str, Any] | None) -> str:
    """Bits per byte of held-out text by source over the checkpoints, as curves and as a table."""
    if not evals or not evals.get("checkpoints"):
        return ""
    # Later sweeps may append earlier checkpoints.
    marks = sorted(evals["checkpoints"], key=lambda mark: mark["step"])
    names = list(dict.fromkeys(name for mark in marks for name in mark["sources"]))
    lines: list[Series] = []
    for name in names:
        with_source = [mark for mark in marks if name in mark["sources"]]
        points = [(mark["step"], mark["sources"][name]["bits_per_byte"]) for mark in with_source]
        lines.append(Series(name, points))
    chart = line_chart(
        lines, x_label="step", y_label="bits per byte", title="Bits per byte by source", log_x=True
    )
    rows: list[list[str]] = []
    for mark in marks:
        cells = [bits_text(mark["sources"].get(name)) for name in names]
        rows.append([number(mark["step"]), *cells])
    values = f"<details><summary>The numbers</summary>{table(['step', *names], rows)}</details>"
    about = (
        "Held-out documents of each source, not used in training, at every checkpoint. Lower is"
        " better; 8 means no compression."
    )
    return section("Bits per byte by source", about, chart + values)


def bits_text(value: Mapping[str, Any] | None) -> str:
    """One cell of the table of bits per byte."""
    if not value:
        return "–"
    return f"{value['bits_per_byte']:.3f}"


def samples_section(samples: Sequence[Mapping[str, Any]] | None) -> str:
    """The model's continuation of each prompt, checkpoint by checkpoint."""
    if not samples:
        return ""
    parts = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        parts.append(f"<h3>After “{escape(prompt.strip())}”</h3>")
        for sample in samples:
            if sample["prompt"] != prompt:
                continue
            text = f"<b>{escape(prompt)}</b>{escape(sample['text'])}"
            parts.append(
                f'<div class="sample"><span>step {sample["step"]}</span><pre>{text}</pre></div>'
            )
    return section(
        "Samples by checkpoint",
        "Prompts and seed are the same at each checkpoint.",
        "".join(parts),
    )


def tiles(values: Mapping[str, Any]) -> str:
    """The run's key figures, each in a box."""
    if not values:
        return ""
    boxes = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in values.items()
    )
    return f'<dl class="tiles">{boxes}</dl>'


def facts_section(run: Path, env: Mapping[str, Any] | None) -> str:
    """The resolved config, which repeats the run, and the machine."""
    parts: list[str] = []
    if env:
        rows: list[tuple[str, str]] = []
        for key, value in env.items():
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append((key, text))
        facts = table(["", ""], rows, "words")
        parts.append(f"<details><summary>Machine and versions</summary>{facts}</details>")
    config = run / "config.yaml"
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    if not parts:
        return ""
    return section("The run", "castalia train config.yaml repeats it.", "".join(parts))


def page(title: str, lead: str, body: str) -> str:
    """The complete document around its sections."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>{body}"
        "<footer>Written by castalia from the files in the run's folder.</footer></main></body>"
        "</html>\n"
    )


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run's folder, from the files in that folder.

    The page is self-contained.

    Returns  its path.
    Raises   DataError if the folder holds neither metrics nor a summary, or a file in it is
             damaged.
    """
    run = Path(run_folder)
    summary = read_json(run / "summary.json") or {}
    metrics: list[dict[str, Any]] = []
    if (run / "metrics.jsonl").exists():
        metrics = read_metrics(run / "metrics.jsonl")
    if not metrics and not summary:
        raise DataError(
            f"{run} is not the folder of a run: it has neither metrics.jsonl nor summary.json"
        )
    body = [
        tiles(summary.get("tiles", {})),
        loss_section(metrics),
        mixture_section(run),
        bits_section(read_json(run / "evals" / "bits_per_byte.json")),
        samples_section(read_json(run / "samples" / "samples.json")),
    ]
    for extra in summary.get("tables", []):
        cells = table(extra["header"], extra["rows"], extra.get("kind", "numbers"))
        body.append(section(extra["title"], extra.get("about", ""), cells))
    body.append(facts_section(run, read_json(run / "env.json")))
    title = summary.get("title", run.resolve().name)
    path = run / "report.html"
    with atomic_write(path) as file:
        file.write(page(title, summary.get("lead", ""), "".join(body)))
    return path
