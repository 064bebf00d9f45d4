"""`castalia scaling`: the scaling law of a suite, with intervals, residuals and predictions."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from castalia.terminal.flags import AsJson, grouped, panel

POINTS = panel("Points")
FIT = panel("Fit")
ASKED = panel("Predictions")


@dataclass(frozen=True)
class PointFlags:
    """Options about the points."""

    metric: Annotated[
        str,
        POINTS(
            metavar="NAME",
            help="loss (validation, else training), valid_loss or train_loss of runs;"
            " bits_per_byte, METRIC or TASK/METRIC of results; the column of a CSV file.",
        ),
    ] = "loss"
    from_step: Annotated[
        int | None,
        POINTS(
            metavar="STEP",
            min=1,
            help="Also use the steps on the way from this one, before the learning rate has"
            " decayed; by default the last one alone.",
        ),
    ] = None
    embeddings: Annotated[
        bool,
        POINTS("--embeddings/--no-embeddings", help="Count embeddings and output head in N."),
    ] = True
    where: Annotated[
        str | None,
        POINTS(metavar="SQL", help='Rows of a results table, such as "shots = 0".'),
    ] = None


@dataclass(frozen=True)
class FitFlags:
    """Options about the fit."""

    law: Annotated[
        str,
        FIT(
            metavar="auto|both|parameters|tokens",
            help="Terms of the law; auto has those whose variable differs between the points.",
        ),
    ] = "auto"
    hold_out: Annotated[
        list[str] | None,
        FIT(
            metavar="MODEL|largest", help="Leave a model out of the fit and predict it. Repeatable."
        ),
    ] = None
    bootstrap: Annotated[
        int, FIT(metavar="N", min=0, help="Replicates behind the intervals; 0 for none.")
    ] = 200
    seed: Annotated[int, FIT(metavar="N", min=0, help="Seed of the bootstrap.")] = 0


@dataclass(frozen=True)
class AskFlags:
    """Options about what the law says."""

    predict: Annotated[
        list[str] | None,
        ASKED(metavar="N:D", help="Predict the loss of a size and tokens, 1.4B:300B. Repeatable."),
    ] = None
    compute: Annotated[
        list[str] | None,
        ASKED(metavar="FLOPS", help="Budget of the compute-optimal frontier, 1e21. Repeatable."),
    ] = None


@grouped
def scaling(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Runs or a folder of runs, a results table, or a CSV file with the columns"
            " parameters, tokens and loss.",
        ),
    ],
    points: PointFlags,
    fit: FitFlags,
    asked: AskFlags,
    as_json: AsJson = False,
) -> None:
    """Fit loss = E + A/N^alpha + B/D^beta to the runs of a suite.

    N is the number of parameters and D that of tokens. Printed are the law with 95% intervals of a
    bootstrap over runs, every point with its residual, predictions, and the best model and tokens
    for a budget of C = 6ND FLOPs. Where all N or all D are equal, the law has the other term alone.

    Examples:

      castalia scaling runs --predict 1.4B:300B

      castalia scaling points.csv --hold-out largest --compute 1e21

      castalia scaling evals --metric lambada_openai/acc --json
    """
    from castalia.analysis.scaling import fit_scaling, read_points
    from castalia.analysis.scaling.points import parse_number, parse_place
    from castalia.analysis.scaling.values import fit_values

    # Before the fit: a word that is wrong is said at once.
    places = [parse_place(text) for text in asked.predict or ()]
    budgets = [parse_number(text, f"--compute {text}") for text in asked.compute or ()]
    source = read_points(
        paths,
        points.metric,
        from_step=points.from_step,
        embeddings=points.embeddings,
        where=points.where,
    )
    fitted = fit_scaling(
        source,
        law=fit.law,
        hold_out=fit.hold_out or (),
        bootstrap=fit.bootstrap,
        seed=fit.seed,
    )
    values = fit_values(fitted, places, budgets)
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        print_fit(values)


def print_fit(values: dict[str, Any]) -> None:
    """The fit as tables."""
    from castalia.analysis.scaling.words import tables_of

    typer.echo(f"{values['formula']}")
    typer.echo(f"loss: {values['metric']}; N: {values['parameters_counted']}")
    for title, header, rows in tables_of(values):
        typer.echo(f"\n{title}")
        print_table(header, rows)
    if values["notes"]:
        typer.echo("")
    for note in values["notes"]:
        typer.echo(f"note: {note}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """One table; the first column is a name."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="italic")
    for place, name in enumerate(header):
        if place == 0:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: a line stays a line
    console.print(table)
