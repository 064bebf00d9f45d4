"""`castalia memorization`: what scans of several models and checkpoints say, with pictures."""

import json
from typing import Annotated, Any

import typer

from castalia.terminal.flags import AsJson


def memorization(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FILE...",
            help="Files of `castalia memorize`, one a model; a NAME stands in the pictures, and its"
            " size, such as 70m, orders the models where the file does not say it.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder of the numbers and the page."
        ),
    ],
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Checkpoints to compare: 0,1000 or 1000:5000; by default all."
        ),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="A run whose rows were scanned: with it, the share memorized by how often the data"
            " repeat a document.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare what models and checkpoints have memorized of the rows that they were trained on.

    The page FOLDER/memorization.html shows the share memorized by checkpoint and size; recall and
    precision of an early checkpoint for the last one, and of a small model for a large one;
    correlations of scores; scores against the place in training; the number of memorized rows in
    windows of the order against Poisson's distribution; scores and losses. The numbers are beside
    it as memorization.json, and each table as CSV and Parquet.

    Examples:

      castalia memorization scans/70m.parquet scans/160m.parquet --output study

      castalia memorization scans/*.parquet --steps 1000: --output study --json
    """
    from castalia.studies.memorization import write_study

    study, page = write_study(files, output, steps, stream)
    if as_json:
        typer.echo(json.dumps(study.data(), indent=2))
        return
    print_shares(study.tables["shares"])
    for note in study.notes:
        typer.echo(note)
    typer.echo(f"memorization: {page}")


def print_shares(lines: list[dict[str, Any]]) -> None:
    """A line for each scan."""
    from castalia.memorization.analyses.study import SEEN

    for line in lines:
        if line["selection"] == SEEN:
            typer.echo(
                f"{line['model']} at {line['step']:,}: {line['memorized']:,} of {line['rows']:,}"
                f" rows memorized ({line['share']:.3%}), mean score {line['mean_score']:.4f}"
            )
