"""`castalia report`."""

from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, one or several.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Page to write; by default report.html in the run's folder, or in this folder for"
            " several runs.",
        ),
    ] = None,
) -> None:
    """Write one page about a run, or about several runs laid over each other.

    The page shows loss, validation, learning rate, gradient norm, speed, memory, events, mixture
    and losses by source, by step, tokens, time or FLOPs. It is one file that works offline. A run
    may still be training.

    Examples:

      castalia report runs/first

      castalia report runs/first runs/second --output both.html
    """
    from castalia.analysis import write_report

    typer.echo(f"report: {write_report(runs, output)}")
