"""Picture, table and page of the study of pronouns."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.analysis.html import NONE, section, table
from castalia.analysis.tuning.chart import Mark, Panel, chart
from castalia.core.files import atomic_write
from castalia.studies.page import figures, write_study_page

if TYPE_CHECKING:
    from castalia.studies.pronouns import Row

TITLE = "Pronouns changed in the last part of training"
LEAD = (
    "The end of a run trained again, with she, her and herself where its text has he, him, his and"
    " himself, beside a control that reads the text as it is."
)
ABOUT = (
    "How much more probable a sentence about a profession is with she than with he, the mean over"
    " professions and sentences, in nats. Above 0 the model prefers she. The control lies on the"
    " run: everything but the pronouns is equal, bit by bit."
)
ABOUT_EFFECTS = (
    "The last checkpoint of each branch. Perplexity is that of unchanged validation text: how much"
    " the change costs."
)


def write_page(output: Path, rows: Sequence["Row"], effects: Sequence[Mapping[str, Any]]) -> None:
    """Write index.html, bias.csv and an SVG for each run."""
    pictures = []
    runs = list(dict.fromkeys(row.run for row in rows))
    for run in runs:
        svg = picture(Path(run).name, [row for row in rows if row.run == run])
        name = "bias.svg"
        if len(runs) != 1:
            name = f"bias-{Path(run).name}.svg"
        with atomic_write(output / name) as file:
            file.write(svg)
        pictures.append(svg)
    write_csv(output / "bias.csv", rows)
    body = section("Preference", ABOUT, figures(pictures))
    body += section("What the change did", ABOUT_EFFECTS, effects_table(effects))
    body += section("By profession", "At the same checkpoints.", profession_table(rows, effects))
    files = "bias.csv and study.json"
    write_study_page(output, TITLE, LEAD, body, tables=files, width=560)


def picture(title: str, rows: Sequence["Row"]) -> str:
    """Preference against step: the run, and for each branch control and intervention."""
    lines: dict[str, list[tuple[float, float]]] = {}
    marks = {}
    controls = {row.folder for row in rows if row.kind == "control"}
    for row in sorted(rows, key=lambda row: row.step):
        name = row.kind
        if row.at is not None:
            marks[row.at] = Mark(row.at, f"{row.at:,}")
            # Branches from one checkpoint share a control, which is one line.
            if row.kind == "intervention" or len(controls) > 1:
                name = f"{row.kind} from {row.at}"
        line = lines.setdefault(name, [])
        if (row.step, row.bias) not in line:
            line.append((row.step, row.bias))
    ends = {row.step: row.bias for row in rows if row.kind == "run"}
    for points in lines.values():
        before = [step for step in ends if step < points[0][0]]
        if before and points[0][0] not in ends:
            # From the checkpoint that the branch came from.
            points.insert(0, (max(before), ends[max(before)]))
    panel = Panel(
        "ln P(she) - ln P(he), nats",
        lines,
        "step",
        log_x=False,
        log_y=False,
        marks=[*marks.values()],
    )
    return chart([[panel]], title)


def effects_table(effects: Sequence[Mapping[str, Any]]) -> str:
    """What each branch did at its last checkpoint."""
    lines = []
    for effect in effects:
        costs = [NONE if value is None else f"{value:.2f}" for value in effect["perplexity"]]
        values = [f"{effect[name]:+.3f}" for name in ("control", "intervention", "difference")]
        names = [Path(effect["run"]).name, f"{effect['at']:,}", f"{effect['step']:,}"]
        lines.append([*names, *values, *costs])
    header = ["run", "from step", "at step", "control", "intervention", "difference"]
    return table([*header, "perplexity, control", "perplexity, intervention"], lines)


def profession_table(rows: Sequence["Row"], effects: Sequence[Mapping[str, Any]]) -> str:
    """Preference by profession of control and intervention, a line a profession."""
    columns: dict[str, Mapping[str, float]] = {}
    controls = {row.folder for row in rows if row.kind == "control"}
    several = len({effect["run"] for effect in effects}) > 1
    for effect in effects:
        ends = {
            row.kind: row
            for row in rows
            if (row.run, row.at, row.step) == (effect["run"], effect["at"], effect["step"])
        }
        for kind in ("control", "intervention"):
            title = kind
            # As in the picture: branches from one checkpoint share a control, shown once.
            if kind == "intervention" or len(controls) > 1:
                title = f"{kind} from {effect['at']:,}"
            if several:
                title = f"{Path(effect['run']).name}, {title}"
            columns[title] = ends[kind].by_profession
    names = list(next(iter(columns.values()), ()))
    lines = [[name, *(f"{own[name]:+.2f}" for own in columns.values())] for name in names]
    return table(["profession", *columns], lines)


def write_csv(path: Path, rows: Sequence["Row"]) -> None:
    """A line for each checkpoint, with a column for each profession."""
    professions = []
    if rows:
        professions = list(rows[0].by_profession)
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "at", "kind", "step", "bias", "perplexity", *professions])
        for row in rows:
            own = [row.by_profession[name] for name in professions]
            writer.writerow([row.run, row.at, row.kind, row.step, row.bias, row.perplexity, *own])
