"""`castalia study pronouns`: the end of a run with other pronouns."""

import json
from typing import Annotated

import typer

from castalia.cli.study import app
from castalia.terminal.flags import AsJson, notes_aside

Paths = Annotated[
    list[str], typer.Argument(metavar="RUN|SUITE...", help="Runs, and folders of runs.")
]
Output = Annotated[
    str, typer.Option(metavar="FOLDER", help="Branches, tables, picture and page go there.")
]
At = Annotated[
    str, typer.Option(metavar="93%,79%", help="Steps, or shares of the run, to branch at.")
]


@app.command("pronouns")
def pronouns(paths: Paths, output: Output, at: At = "93%,79%", as_json: AsJson = False) -> None:
    """Train the end of runs again with feminine pronouns in the place of masculine ones.

    Each run gets a branch for each --at and its control, which reads the text as it is. All
    checkpoints are asked whether they prefer she or he in sentences about professions; the
    perplexity of unchanged text says what the change costs. The same command continues a study that
    was stopped.

    Examples:

      castalia study pronouns runs/pythia-70m --output studies/pronouns

      castalia study pronouns runs/mini --at 79% --output studies/pronouns --json
    """
    from pathlib import Path

    from castalia.studies.pronouns import pronouns as study

    shares = [share.strip() for share in at.split(",")]
    with notes_aside(as_json):
        record = study(paths, shares, Path(output), typer.echo)
    if as_json:
        typer.echo(json.dumps(record))
        return
    for effect in record["effects"]:
        typer.echo(
            f"{effect['run']} from step {effect['at']}: she over he {effect['control']:+.3f} nats"
            f" in the control, {effect['intervention']:+.3f} with changed pronouns"
        )
    typer.echo(f"{output}/index.html")
