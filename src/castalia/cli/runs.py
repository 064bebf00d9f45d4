"""`castalia runs`: the runs of a folder, with step, loss, state and checkpoints."""

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import AsJson

if TYPE_CHECKING:
    from castalia.analysis.run_list import RunState

USUAL = "runs"
"""Folder of the presets' runs."""


def runs(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]", help="Folder of the runs, or one run; by default runs, else this one."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs with their step, loss, state and checkpoints.

    The state is running, done, stopped (the same command, or `castalia train RUN`, resumes it), not
    begun, or unreadable (config.yaml is damaged). The loss is that of the last step that has one,
    in nats a token.

    Examples:

      castalia runs

      castalia runs /shared/runs --json
    """
    from castalia.analysis.run_list import find_runs

    if folder is None:
        folder = USUAL if os.path.isdir(USUAL) else "."
    states = find_runs(folder)
    if as_json:
        typer.echo(json.dumps([as_object(run) for run in states], indent=2))
    elif states:
        print_runs(states)
    else:
        typer.echo(f"no runs in {folder}; castalia train debug begins one", err=True)


def as_object(run: "RunState") -> dict[str, Any]:
    """A run as plain values."""
    return run._asdict() | {"folder": str(run.folder)}


def print_runs(states: "list[RunState]") -> None:
    """One line a run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="italic")
    table.add_column("run", overflow="fold")
    for name in ("step", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "checkpoints", "last step"):
        table.add_column(name, no_wrap=True)
    for run in states:
        table.add_row(*cells(run))
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: a line stays a line
    console.print(table)


def cells(run: "RunState") -> list[str]:
    """The columns of one run."""
    import time

    from castalia.monitor.display import duration

    saved = "none"
    if run.checkpoints:
        saved = f"{len(run.checkpoints)}, newest {run.checkpoints[-1]}"
    total = "?" if run.steps is None else str(run.steps)
    loss = "-" if run.loss is None else f"{run.loss:.4f}"
    age = duration(max(0.0, time.time() - run.changed))
    return [str(run.folder), f"{run.step}/{total}", loss, run.state, saved, f"{age} ago"]
