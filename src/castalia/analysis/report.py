"""`report.html`: one page that says what a run did, made of the files in the run's folder.

Read, and left out of the page when absent: `metrics.jsonl`, `mixture.jsonl`, `evals/bits_per_byte.json`,
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
"""Points of the loss curve that are drawn; longer runs are averaged by stretches of equal width on the axis."""
SMOOTHING = 8
"""The mean curve averages over this part of the run's steps so far: step / SMOOTHING, at least one."""


def read_json(path: Path) -> Any:
    """The JSON value in a file; None when the file is not there.

    Raises  DataError if it is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; remove it and make it again") from None


def thin(
    points: Sequence[tuple[float, float]], most: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """At most `most` points: means of x and y over stretches of equal width in log(1 + x)."""
    if len(points) <= most:
        return list(points)
    stretches: dict[int, list[tuple[float, float]]] = {}
    width = math.log1p(points[-1][0]) / (most - 1) or 1.0
    for point in points:
        stretches.setdefault(int(math.log1p(point[0]) / width), []).append(point)
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in stretches.values()
    ]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean whose memory grows with the step, so that the steep start is not smeared."""
    out: list[tuple[float, float]] = []
    mean = points[0][1] if points else 0.0
    for x, y in points:
        mean += (y - mean) / max(1.0, x / SMOOTHING)
        out.append((x, mean))
    return out


def loss_section(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The training loss by step, each step and the mean."""
    points = [(float(m["step"]), float(m["loss"])) for m in metrics if m.get("loss") is not None]
    if not points:
        return ""
    lines = [Series("each step", thin(points), True), Series("mean", thin(smooth(points), 120))]
    chart = line_chart(
        lines, x_label="step", y_label="nats per token", title="Training loss by step", log_x=True
    )
    last = f"It ended at {smooth(points)[-1][1]:.3f} nats per token after step {number(points[-1][0])}."
    return section(
        "Training loss",
        f"Cross-entropy on the rows of each step; the bold line is its mean. {last}",
        chart,
    )


def bits_section(evals: Mapping[str, Any] | None) -> str:
    """Bits per byte of held-out text by source over the checkpoints, as curves and as a table."""
    if not evals or not evals.get("checkpoints"):
        return ""
    marks = sorted(evals["checkpoints"], key=lambda mark: mark["step"])
    names = list(dict.fromkeys(name for mark in marks for name in mark["sources"]))
    lines = [
        Series(
            name,
            [
                (m["step"], m["sources"][name]["bits_per_byte"])
                for m in marks
                if name in m["sources"]
            ],
        )
        for name in names
    ]
    chart = line_chart(
        lines, x_label="step", y_label="bits per byte", title="Bits per byte by source", log_x=True
    )
    rows = [
        [number(m["step"]), *(bits_text(m["sources"].get(name)) for name in names)] for m in marks
    ]
    values = f"<details><summary>The numbers</summary>{table(['step', *names], rows)}</details>"
    about = "Held-out documents of each source, never seen in training, at every checkpoint. Lower is better; 8 is text "
    return section("Bits per byte by source", about + "sent as it stands.", chart + values)


def bits_text(value: Mapping[str, Any] | None) -> str:
    """One cell of the table of bits per byte."""
    return f"{value['bits_per_byte']:.3f}" if value else "–"


def samples_section(samples: Sequence[Mapping[str, Any]] | None) -> str:
    """What the model wrote after each prompt, checkpoint by checkpoint."""
    if not samples:
        return ""
    parts = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        parts.append(f"<h3>After “{escape(prompt.strip())}”</h3>")
        for sample in samples:
            if sample["prompt"] == prompt:
                text = f"<b>{escape(prompt)}</b>{escape(sample['text'])}"
                parts.append(
                    f'<div class="sample"><span>step {sample["step"]}</span><pre>{text}</pre></div>'
                )
    return section(
        "Samples by checkpoint",
        "The same prompts and the same seed at each checkpoint.",
        "".join(parts),
    )


def tiles(values: Mapping[str, Any]) -> str:
    """The run's main figures, each in a box."""
    boxes = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in values.items()
    )
    return f'<dl class="tiles">{boxes}</dl>' if boxes else ""


def facts_section(run: Path, env: Mapping[str, Any] | None) -> str:
    """What repeats the run: the config as it was resolved, and the machine."""
    parts = []
    if env:
        rows = [
            (key, value if isinstance(value, str) else json.dumps(value))
            for key, value in env.items()
        ]
        parts.append(
            f"<details><summary>Machine and versions</summary>{table(['', ''], rows, 'words')}</details>"
        )
    config = run / "config.yaml"
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    return (
        section("The run", "castalia train config.yaml repeats it.", "".join(parts))
        if parts
        else ""
    )


def page(title: str, lead: str, body: str) -> str:
    """The whole document around its sections."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>{body}"
        "<footer>Written by castalia from the files in the run's folder.</footer></main></body></html>\n"
    )


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run's folder out of the files that stand there; it needs nothing else to be read.

    Returns  its path.
    Raises   DataError if the folder holds neither metrics nor a summary, or a file in it is broken.
    """
    run = Path(run_folder)
    summary = read_json(run / "summary.json") or {}
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    if not metrics and not summary:
        raise DataError(
            f"{run} holds no metrics.jsonl and no summary.json: it is not the folder of a run"
        )
    body = [
        tiles(summary.get("tiles", {})),
        loss_section(metrics),
        mixture_section(run),
        bits_section(read_json(run / "evals" / "bits_per_byte.json")),
        samples_section(read_json(run / "samples" / "samples.json")),
        *(
            section(
                t["title"],
                t.get("about", ""),
                table(t["header"], t["rows"], t.get("kind", "numbers")),
            )
            for t in summary.get("tables", [])
        ),
        facts_section(run, read_json(run / "env.json")),
    ]
    path = run / "report.html"
    with atomic_write(path) as file:
        file.write(
            page(summary.get("title", run.resolve().name), summary.get("lead", ""), "".join(body))
        )
    return path
