"""`castalia doctor`: what this machine can do, what is chosen on it, and what is installed."""

import json
import sys
from typing import Annotated

import typer

from castalia.terminal.flags import AsJson


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure anew; best while nothing else runs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show this machine, how fast it computes, what is chosen by that, and what is installed.

    The rates are measured once, in two seconds, for each number of threads and each cap on the
    instructions. Whatever is chosen by speed reads the same table.

    Examples:

      castalia doctor

      castalia doctor --measure --json
    """
    if sys.stderr.isatty():
        # No progress bar: it would take time from what is measured.
        typer.echo("measuring this machine, some seconds ...", err=True)
    from castalia.cli.doctor_facts import examined

    found = examined(measure)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from castalia.cli.doctor_page import print_page

    print_page(found)
