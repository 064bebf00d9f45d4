"""Picture, table and page of the study of pronouns."""

import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.analysis.html import NONE, section, table
from castalia.analysis.page_file import FOLDER
from castalia.analysis.tuning.chart import Mark, Panel, chart
from castalia.core.files import atomic_write

if TYPE_CHECKING:
    from castalia.studies.pronouns import Row

STYLE = """
.figures{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0}
.figures figure{margin:0;background:#fff;border:1px solid var(--edge);border-radius:10px;
padding:6px;flex:0 1 560px;min-width:0}
.figures svg{display:block;width:100%;height:auto}
"""
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
    figures = []
    runs = list(dict.fromkeys(row.run for row in rows))
    for run in runs:
        svg = picture(Path(run).name, [row for row in rows if row.run == run])
        name = "bias.svg" if len(runs) == 1 else f"bias-{Path(run).name}.svg"
        with atomic_write(output / name) as file:
            file.write(svg)
        figures.append(f"<figure>{svg}</figure>")
    write_csv(output / "bias.csv", rows)
    body = section("Preference", ABOUT, f'<div class="figures">{"".join(figures)}</div>')
    body += section("What the change did", ABOUT_EFFECTS, effects_table(effects))
    body += section("By profession", "At the same checkpoints.", profession_table(rows, effects))
    with atomic_write(output / "index.html") as file:
        file.write(page(body))


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
    header = ["profession"]
    columns = []
    for effect in effects:
        for kind in ("control", "intervention"):
            wanted = (effect["run"], effect["at"], kind, effect["step"])
            columns += [r.by_profession for r in rows if (r.run, r.at, r.kind, r.step) == wanted]
            header.append(f"{Path(effect['run']).name}, {kind} from {effect['at']}")
    names = list(columns[0]) if columns else []
    return table(
        header, [[name, *(f"{column[name]:+.2f}" for column in columns)] for name in names]
    )


def write_csv(path: Path, rows: Sequence["Row"]) -> None:
    """A line for each checkpoint, with a column for each profession."""
    professions = list(rows[0].by_profession) if rows else []
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "at", "kind", "step", "bias", "perplexity", *professions])
        for row in rows:
            own = [row.by_profession[name] for name in professions]
            writer.writerow([row.run, row.at, row.kind, row.step, row.bias, row.perplexity, *own])


def page(body: str) -> str:
    """The page: one file that fetches nothing."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8") + STYLE
    title = "Pronouns changed in the last part of training"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(LEAD)}</p></header>{body}"
        "<footer>Written by castalia. All numbers stand in bias.csv and study.json beside this"
        " page.</footer></main></body></html>\n"
    )
