"""`report.html`: runs and results of evaluations on one page, made from files in their folders.

Each of these files is optional: `metrics.jsonl`, `mixture.jsonl`, `events.jsonl`,
`evals/bits_per_byte.json`, `evals/results.parquet`, `samples/samples.json`, `summary.json` (title,
lead, tiles, tables), `config.yaml`, `env.json`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from castalia.analysis.axes import axes_of
from castalia.analysis.events import events_panel, events_table
from castalia.analysis.figures import bits_text, final_rows
from castalia.analysis.html import folded, section, table, tiles
from castalia.analysis.inputs import find_inputs
from castalia.analysis.measures import LEARNING, MACHINE, other_measures
from castalia.analysis.page_file import write_page
from castalia.analysis.panel import Panel, Smooth, rounded
from castalia.analysis.runs import RunFiles
from castalia.analysis.samples import samples_sections
from castalia.analysis.scaling.part import scaling_part
from castalia.analysis.scores import Flops, scores_data
from castalia.analysis.smoothing import WINDOWS, ending, local_linear
from castalia.analysis.sources import HEADER, mixture_rows, source_panels
from castalia.config.values import flatten
from castalia.core.errors import ConfigError, DataError
from castalia.core.files import several
from castalia.results import EVALS, ResultsStore

REPORT = "report.html"
MISSING = "absent"
CUT = "The start is above the chart; y scale “linear” shows all of it."
SCORES = '<section id="scores"></section>'
"""The place that scores.js fills."""
ALONE = '<section id="scores" class="alone"></section>'
"""The same on a page without runs, whose title and lead are about the results."""
AXIS_DIGITS = 10
"""Significant digits on an axis: a step of a million tokens in a trillion."""


def write_report(
    paths: str | Path | Sequence[str | Path], output: str | Path | None = None
) -> Path:
    """Write one page about runs, laid over each other, and about results of evaluations.

    The page is one file that works offline. It needs the extra `report`, and for results `results`.

    paths    runs, folders of runs, results stores; also files in them such as RUN/config.yaml.
    output   file to write; by default report.html in the folder of the only path, or in the current
             folder for several.
    Returns  its path.
    Raises   DataError if a folder holds nothing to show, or a file in it is damaged; ConfigError if
             Plotly is not installed or `output` is a folder.
    """
    names = [Path(path) for path in several(paths)]
    runs, stores = find_inputs(names).read()
    path = Path(output or REPORT)
    if not output and len(names) == 1:
        folder = names[0].parent if names[0].is_file() else names[0]
        path = folder / REPORT
    # Before the panels: the smoothing of long runs takes a while.
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file to write, such as {path / REPORT}")
    page = contents_of(runs, stores)
    if not runs and "scores" not in page.data:
        raise DataError(f"{stores[0].path} has no number yet; import or evaluate something first")
    write_page(path, page.title, page.lead, page.charts + page.parts, page.data)
    return path


class Contents(NamedTuple):
    """What a page shows; `castalia view` makes it anew when the files have changed."""

    title: str
    lead: str
    charts: str
    """HTML: key figures, controls, and a box for each panel."""
    parts: str
    """HTML: what stands below the charts."""
    data: dict[str, Any]
    """What the scripts draw, as JSON values."""


def contents_of(
    files: Sequence[RunFiles],
    stores: Sequence[ResultsStore] = (),
    scores_of: Callable[..., dict[str, Any] | None] = scores_data,
    smooth: Smooth = local_linear,
) -> Contents:
    """The page about runs and results.

    scores_of  `scores_data`, and smooth `local_linear`, or what keeps their answers.

    Raises  DataError if a file in a run's folder or a store is damaged.
    """
    panels = panels_of(files)
    figures = ""
    if len(files) == 1:
        figures = tiles(files[0].summary.get("tiles", {}))
    data: dict[str, Any] = {
        "runs": [{"name": run.name, "axes": axes_data(run)} for run in files],
        "panels": [panel.data(smooth) for panel in panels],
        "windows": WINDOWS,
    }
    boxes = "".join(charts(panels))
    scores = None
    if stores:
        scores = scores_of(stores, counted_flops(files))
    if scores is not None:
        data["scores"] = scores
        # In a section of their own, so that their controls end where the evaluations begin.
        boxes = f'<section class="training">{boxes}</section>{SCORES}' if boxes else ALONE
    law = scaling_part(files)
    if law.data is not None:
        data["scaling"] = law.data
    return Contents(
        title=title_of(files, stores),
        lead=lead_of(files) if files or not scores else scores["about"],
        charts=figures + boxes,
        parts=law.html + "".join(parts(files)) if files else "",
        data=data,
    )


def counted_flops(runs: Sequence[RunFiles]) -> Flops:
    """FLOPs of a training token of each run, by its folder and the one around it.

    Both: a run of one's own may have the name of a published model.
    """
    folders = [run.folder.resolve() for run in runs]
    return {
        (folder.parent.name, folder.name): run.flops_per_token
        for folder, run in zip(folders, runs, strict=True)
    }


def title_of(runs: Sequence[RunFiles], stores: Sequence[ResultsStore] = ()) -> str:
    """The page's title."""
    if not runs and stores:
        # The default name of every store says nothing.
        folders = [store.folder.resolve() for store in stores]
        names = [folder.parent.name if folder.name == EVALS else folder.name for folder in folders]
        return "Evaluations of " + ", ".join(dict.fromkeys(names))
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def lead_of(runs: Sequence[RunFiles]) -> str:
    """The line below the title: the summary's, and where the run ended."""
    if len(runs) != 1:
        return ""  # the names stand in the controls
    parts = [str(runs[0].summary.get("lead", ""))]
    steps, losses = runs[0].curve("loss")
    if len(steps):
        value, _ = ending(steps, losses)
        parts.append(f"The loss ended at {value:.4f} nats per token after step {steps[-1]:,.0f}.")
    return " ".join(part for part in parts if part)


def panels_of(runs: Sequence[RunFiles]) -> list[Panel]:
    """Every panel of the page, in its order."""
    learning = [measure.panel(runs) for measure in (*LEARNING, *other_measures(runs))]
    machine = [measure.panel(runs) for measure in MACHINE]
    # The events stand below the loss, whose jumps they explain.
    panels = [*learning[:1], events_panel(runs), *learning[1:], *source_panels(runs), *machine]
    return [panel for panel in panels if panel is not None]


def charts(panels: Sequence[Panel]) -> list[str]:
    """A box for each panel, which page.js fills."""
    boxes: list[str] = []
    for number, panel in enumerate(panels):
        wide = " spread" if panel.wide else ""
        unit = ""
        if panel.unit:
            unit = f' <span class="unit">{escape(panel.unit)}</span>'
        boxes.append(
            f'<figure class="panel{wide}" data-panel="{number}"><figcaption>'
            f"<h2>{escape(panel.title)}{unit}</h2>"
            f'<p class="about">{escape(panel.about)}</p></figcaption>'
            f'<div class="keys"></div><p class="cut" hidden>{CUT}</p><div class="plot" role="img"'
            f' aria-label="{escape(spoken(panel))}"></div></figure>'
        )
    if not boxes:
        return []
    return [f'<div id="controls"></div><div class="panels">{"".join(boxes)}</div>']


def spoken(panel: Panel) -> str:
    """A panel in words, for a reader who does not see it."""
    parts = [panel.title]
    for series in panel.series[:8]:
        steps, values = series.curve
        parts.append(
            f"{series.name}: {values[0]:.4g} at step {steps[0]:.0f},"
            f" {values[-1]:.4g} at step {steps[-1]:.0f}"
        )
    return "; ".join(parts)


def parts(runs: Sequence[RunFiles]) -> list[str]:
    """What stands below the charts."""
    body = [final_section(runs), events_table(runs), differences_section(runs), bits_table(runs)]
    body += [mixture_table(run, len(runs) > 1) for run in runs]
    body.append(samples_sections(runs))
    for run in runs:
        for extra in run.summary.get("tables", []):
            body.append(summary_table(extra))
    body += [facts_section(run, len(runs) > 1) for run in runs]
    return body


def summary_table(extra: Mapping[str, Any]) -> str:
    """A table of summary.json; one of texts is folded."""
    kind = extra.get("kind", "numbers")
    cells = table(extra["header"], extra["rows"], kind)
    if kind == "code":
        cells = folded("The texts", cells)
    return section(extra["title"], extra.get("about", ""), cells)


def final_section(runs: Sequence[RunFiles]) -> str:
    """The table of final values."""
    rows = final_rows(runs)
    if not rows:
        return ""
    names = [""]  # the page's title has it
    if len(runs) > 1:
        names = [run.name for run in runs]
    cells = table(["", *names], rows, "numbers final")
    return section("Final values", ending_note(runs), cells)


def ending_note(runs: Sequence[RunFiles]) -> str:
    """How the loss at the end is computed."""
    counts = {ending(*curve)[1] for curve in (run.curve("loss") for run in runs) if len(curve[0])}
    if not counts:
        return ""
    steps = " or ".join(f"{count:,}" for count in sorted(counts))
    return (
        f"A value “at the end” is that of a local linear fit to the last {steps} steps, without"
        " the lag of a trailing mean."
    )


def differences_section(runs: Sequence[RunFiles]) -> str:
    """The config keys in which the runs differ."""
    configs = [
        {key: json.dumps(value, default=str) for key, value in flatten(run.config).items()}
        for run in runs
    ]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows: list[list[str]] = []
    for key in keys:
        values = [config.get(key, MISSING) for config in configs]
        # `output` differs between any two runs.
        if len(set(values)) > 1 and key != "output":
            rows.append([key, *values])
    if not rows:
        return ""
    header = ["key", *(run.name for run in runs)]
    return section("What differs", "Keys of config.yaml.", table(header, rows, "words"))


def bits_table(runs: Sequence[RunFiles]) -> str:
    """Bits per byte at every checkpoint as a folded table for each run; "" without any."""
    tables: list[str] = []
    for run in runs:
        marks = run.bits
        names = list(dict.fromkeys(name for mark in marks for name in mark["sources"]))
        rows = [[f"{mark['step']:,}", *(bits_text(mark, name) for name in names)] for mark in marks]
        if rows:
            title = f"Bits per byte{of_run(run, len(runs) > 1)} at every checkpoint"
            tables.append(folded(title, table(["step", *names], rows)))
    return "".join(tables)


def mixture_table(run: RunFiles, named: bool) -> str:
    """The sources of a mixed run beside the prior, folded; "" for another run."""
    rows = mixture_rows(run)
    if not rows:
        return ""
    return folded("Sources of the mixture" + of_run(run, named), table(HEADER, rows))


def of_run(run: RunFiles, named: bool) -> str:
    """The end of a title about one run; `named` where the page is about several."""
    return f" of {run.name}" if named else ""


def facts_section(run: RunFiles, named: bool) -> str:
    """The resolved config, which repeats the run, and the machine."""
    boxes: list[str] = []
    env: Mapping[str, Any] = run.json("env.json") or {}
    rows = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in env.items()]
    if rows:
        boxes.append(folded("Machine and versions", table(["", ""], rows, "words")))
    config = run.folder / "config.yaml"
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        boxes.append(folded("config.yaml", f"<pre>{text}</pre>"))
    if not boxes:
        return ""
    title = run.name if named else "The run"
    return section(title, "castalia train config.yaml repeats it.", "".join(boxes))


def axes_data(run: RunFiles) -> dict[str, Any]:
    """The axes of a run as JSON values; null for one that its files do not give."""
    axes = axes_of(run)._asdict()
    return {
        name: None if axis is None else rounded(axis, AXIS_DIGITS) for name, axis in axes.items()
    }
