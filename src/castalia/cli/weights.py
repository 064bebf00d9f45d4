"""`castalia weights`: statistics of the weights of checkpoints."""

import json
from typing import Annotated

import typer

from castalia.terminal.flags import AsJson


def weights(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Runs, folders of runs or of revisions, or whatever else `castalia eval` takes.",
        ),
    ],
    output: Annotated[str, typer.Option(metavar="FILE", help="FILE.parquet, the table.")],
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="all, last, 0,1,1000 or 1000:5000 (both included); by default all.",
        ),
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Also singular values of matrices.")
    ] = False,
    page: Annotated[
        str | None, typer.Option(metavar="FILE", help="FILE.html, curves over the steps.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the weights of checkpoints: norms, moments, spectra, and how far they travel.

    The table has a row for each checkpoint and tensor, layer and model: size, L1 and L2 norm,
    mean, variance, median, kurtosis and largest value; distance from the first checkpoint and from
    the one before; and, for two seeds of one shape, distance and cosine between them.

    The same command again measures what is new. Stopped, it goes on where it was.

    Examples:

      castalia weights runs/debug --output weights.parquet --page weights.html

      castalia weights runs --steps 0,1000,5000 --spectra --output weights.parquet
    """
    from castalia.terminal.progress import counted_progress
    from castalia.terminal.signals import stoppable
    from castalia.weights.sweep import sweep

    with stoppable("the same command goes on"), counted_progress("weights") as advance:
        measured = sweep(paths, output, steps=steps, spectra=spectra, on_checkpoint=advance)
    if page is not None:
        from castalia.analysis.weights import write_weights_page

        write_weights_page(output, page)
    if as_json:
        values = {"output": output, "page": page, "measured": [m._asdict() for m in measured]}
        typer.echo(json.dumps(values, indent=2))
        return
    typer.echo(f"{output}: {len(measured)} checkpoints measured")
    if page is not None:
        typer.echo(page)
