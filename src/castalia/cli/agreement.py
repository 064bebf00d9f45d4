"""`castalia agreement`: whether checkpoints and seeds answer alike."""

import json
from typing import Annotated

import typer

from castalia.terminal.flags import AsJson


def agreement(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Runs, suites or folders of results of `eval --samples`."
        ),
    ],
    task: Annotated[str | None, typer.Option(metavar="TASK", help="This task alone.")] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE", help="FILE.svg, curves over the steps.")
    ] = None,
    page: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="FILE.html, the same curves as wide as the screen is."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the answers of checkpoints document by document: Cohen's kappa.

    Each step is compared with the last one of its model, and models that differ in the seed of
    their name, such as tiny-seed0 and tiny-seed1, with each other at every step. Kappa is 1 for
    equal answers and 0 for as many as chance gives. The answers are those that
    `castalia eval runs/suite --steps all --tasks piqa --samples` stores.

    Example:

      castalia agreement runs/suite --picture agreement.svg --page agreement.html
    """
    from castalia.cli.scaling import print_table
    from castalia.weights.agreement import agreements

    if picture is not None:
        from castalia.analysis.tuning.chart import picture_file

        picture_file(picture)
    rows = agreements(paths, task)
    if picture is not None:
        from castalia.analysis.agreement import write_agreement

        write_agreement(rows, picture)
    if page is not None:
        from castalia.analysis.agreement import write_agreement_page

        write_agreement_page(rows, page)
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    header = ["task", "model", "step", "other", "its step", "documents", "equal", "kappa"]
    print_table(header, [row.cells() for row in rows])
