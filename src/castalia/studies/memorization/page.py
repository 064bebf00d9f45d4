"""`memorization.html`: a study of memorization as one page that works offline."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from castalia.analysis.html import NONE, folded, section, table, tiles
from castalia.analysis.page_file import STYLES, write_page
from castalia.core.errors import ConfigError
from castalia.core.files import cannot_write
from castalia.memorization.analyses.files import open_scans
from castalia.memorization.analyses.output import write_numbers
from castalia.memorization.analyses.study import SEEN, Study, study_of
from castalia.stream.opening import open_stream
from castalia.studies.memorization.comparisons import (
    correlation_chart,
    early_chart,
    names_of,
    share_chart,
    small_chart,
    steps_of,
)
from castalia.studies.memorization.distributions import (
    dose_chart,
    histogram_chart,
    loss_chart,
    position_chart,
    quantile_chart,
    slope_chart,
    window_chart,
)

PAGE = "memorization.html"


def write_study(
    files: Sequence[str],
    output: str | Path,
    steps: str | None = None,
    stream: str | None = None,
) -> tuple[Study, Path]:
    """Analyze scans of `castalia memorize`, and write numbers and a page into a folder.

    files    FILE or NAME=FILE, one a model.
    steps    the checkpoints to keep, as `castalia eval --steps` takes them; None for all.
    stream   a run whose rows were scanned: with it, scores by how often the data repeat a text.
    Returns  the study, and the path of the page.
    Raises   ConfigError or DataError if files are missing, damaged or do not compare; ConfigError
             if `output` is a file.
    """
    folder = Path(output)
    # Before the work: hours of a large study must not end at a wrong name.
    if folder.is_file():
        raise ConfigError(f"--output {folder} is a file; name a folder")
    scans = open_scans(files, steps)
    rows = None
    if stream is not None:
        rows = open_stream(stream, lambda text: None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    study = study_of(scans, folder, rows)
    write_numbers(study, folder)
    write_study_page(study, folder / PAGE)
    return study, folder / PAGE


def write_study_page(study: Study, path: Path) -> None:
    """Write the page.

    Raises  ConfigError if Plotly is not installed.
    """
    made = (
        share_chart(study),
        dose_chart(study),
        early_chart(study),
        small_chart(study),
        correlation_chart(study),
        slope_chart(study),
        position_chart(study),
        quantile_chart(study),
        window_chart(study),
        histogram_chart(study) if study.scored else None,
        loss_chart(study),
    )
    charts = [chart for chart in made if chart is not None]
    boxes = "".join(chart.box(number) for number, chart in enumerate(charts))
    write_page(
        path,
        "Memorization",
        lead_of(study),
        key_figures(study) + notes(study) + f'<div class="panels">{boxes}</div>' + tables(study),
        {"charts": [chart.data() for chart in charts]},
        styles=(*STYLES, "memorization.css"),
        scripts=("base.js", "memorization.js"),
    )


def lead_of(study: Study) -> str:
    """What was scanned."""
    file = study.scans[0].file
    return (
        f"Greedy continuations of {file.continuation} tokens after prompts of {file.prompt}, of"
        f" rows that the models were trained on: {', '.join(names_of(study))}."
    )


def key_figures(study: Study) -> str:
    """Figures of the last checkpoint of the largest model."""
    last = study.scans[-1]
    lines = study.tables["shares"]
    line = next(
        line
        for line in lines
        if (line["model"], line["step"], line["selection"]) == (last.file.name, last.step, SEEN)
    )
    return tiles(
        {
            "Models": len(names_of(study)),
            "Checkpoints": len(steps_of(study)),
            "Rows seen by all": f"{study.common:,}",
            f"Memorized by {last.file.name} at {last.step:,}": f"{line['memorized']:,}"
            f" ({line['share']:.3%})",
        }
    )


def notes(study: Study) -> str:
    """What these scans cannot show."""
    return "".join(f'<p class="note">{escape(note)}</p>' for note in study.notes)


def tables(study: Study) -> str:
    """The numbers behind the pictures, folded."""
    parts = (
        ("Memorized rows", share_rows(study)),
        ("Predictions", prediction_rows(study)),
        ("Slopes over the order", slope_rows(study)),
        ("Density of memorized rows", density_rows(study)),
    )
    body = "".join(folded(title, table(rows[0], rows[1:])) for title, rows in parts if rows[1:])
    about = "The same and more as JSON, CSV and Parquet beside this page."
    return section("Numbers", about, body)


def share_rows(study: Study) -> list[list[str]]:
    """The table of shares under its header."""
    header = ["model", "step", "rows", "of", "memorized", "share", "95%", "mean score", "95%"]
    return [header] + [
        [
            line["model"],
            f"{line['step']:,}",
            line["selection"],
            f"{line['rows']:,}",
            f"{line['memorized']:,}",
            percent(line["share"]),
            interval(line, "share", percent),
            number(line["mean_score"]),
            interval(line, "mean", number),
        ]
        for line in study.tables["shares"]
    ]


def prediction_rows(study: Study) -> list[list[str]]:
    """The table of predictions under its header."""
    header = ["predictor", "target", "rows", "both", "predictor alone", "target alone"]
    header += ["recall", "95%", "precision", "95%", "F1", "false positive rate"]
    return [header] + [
        [
            f"{line['predictor']} at {line['predictor_step']:,}",
            f"{line['target']} at {line['target_step']:,}",
            f"{line['rows']:,}",
            f"{line['true_positives']:,}",
            f"{line['false_positives']:,}",
            f"{line['false_negatives']:,}",
            percent(line["recall"]),
            interval(line, "recall", percent),
            percent(line["precision"]),
            interval(line, "precision", percent),
            percent(line["f1"]),
            percent(line["false_positive_rate"]),
        ]
        for line in study.tables["predictions"]
    ]


def slope_rows(study: Study) -> list[list[str]]:
    """The table of regressions under its header."""
    header = ["model", "step", "rows", "slope per million rows", "95%", "change over the order"]
    return [header] + [
        [
            line["model"],
            f"{line['step']:,}",
            f"{line['rows']:,}",
            number(line["slope_per_million"]),
            interval(line, "slope", number),
            percent(line["change"]),
        ]
        for line in study.tables["slopes"]
    ]


def density_rows(study: Study) -> list[list[str]]:
    """The table of dispersion tests under its header."""
    header = ["model", "step", "rows of a window", "windows", "memorized in a window"]
    header += ["index of dispersion", "p"]
    return [header] + [
        [
            line["model"],
            f"{line['step']:,}",
            f"{line['window']:,}",
            f"{line['windows']:,}",
            number(line["rate"]),
            number(line["dispersion"]),
            number(line["p_value"]),
        ]
        for line in study.tables["densities"]
    ]


def percent(value: float | None) -> str:
    """A share as text."""
    if value is None:
        return NONE
    return f"{100 * value:.3g}%"


def number(value: float | None) -> str:
    """A number as text."""
    if value is None:
        return NONE
    return f"{value:.3g}"


def interval(line: dict[str, Any], name: str, text: Any) -> str:
    """An interval as text."""
    if line[f"{name}_low"] is None:
        return NONE
    return f"{text(line[f'{name}_low'])} to {text(line[f'{name}_high'])}"
