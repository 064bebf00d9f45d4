"""`castalia report`."""

from typing import Annotated

import typer


def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Runs, folders of runs, and results stores, in any mix."
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Page to write; by default report.html in the folder of the only path, or in this"
            " folder for several.",
        ),
    ] = None,
) -> None:
    """Write one page about runs, laid over each other, and about results of evaluations.

    The page shows loss, validation, learning rate, gradient norm, speed, memory, events, mixture
    and losses by source, by step, tokens, time or FLOPs. Of results it shows the score against
    training, size and compute, tables, and two models or suites compared. It is one file that works
    offline. A run may still be training.

    Examples:

      castalia report runs/first

      castalia report runs/first runs/second --output both.html

      castalia report runs evals/pythia
    """
    from castalia.analysis import write_report

    typer.echo(f"report: {write_report(paths, output)}")
