"""`castalia audit`: whether checkpoints are what their names say."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.terminal.flags import AsJson

if TYPE_CHECKING:
    from castalia.weights.findings import Report

MOST_OF_A_KIND = 12
"""Findings of one kind that are printed; --json has all."""


Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Runs, a folder with step0, step1000, ... of one model, the hub's cache of a model, or"
        " a folder of these.",
    ),
]
Expect = Annotated[
    str | None,
    typer.Option(
        metavar="pythia|STEPS",
        help="Steps that each model should have: pythia for its 154, or 0,1,2,1000:5000:1000.",
    ),
]
Hashes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="SHA-256 by file, `step0/model.safetensors HASH`, or sha256sum's output.",
    ),
]
StillUntil = Annotated[
    int | None,
    typer.Option(
        metavar="STEP",
        min=0,
        help="Last step that may equal step 0, since the learning rate was 0; by default what the"
        " run's schedule says, and 1 for Pythia.",
    ),
]


def audit(
    paths: Paths,
    expect: Expect = None,
    hashes: Hashes = None,
    still_until: StillUntil = None,
    as_json: AsJson = False,
) -> None:
    """Check that checkpoints are what their names say.

    Every tensor is read once. Found are damaged files, two steps with equal weights, a shard of
    another step, steps out of order, missing steps, tensors that differ in name or shape, NaN,
    start weights that are not those of the seed, and checkpoints that do not descend from step 0.
    The exit status is 1 if anything is found.

    Examples:

      castalia audit runs/debug

      castalia audit models/pythia-70m --expect pythia --json
    """
    from castalia.terminal.progress import counted_progress
    from castalia.weights.audit import audit as audited

    with counted_progress("audit") as advance:
        report = audited(
            paths,
            expect=expect,
            hashes=hashes,
            still_until=still_until,
            on_revision=advance,
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)
    if not report.ok:
        raise typer.Exit(1)


def print_report(report: "Report") -> None:
    """The findings by kind, and how much was read."""
    from castalia.monitor.display import size_text
    from castalia.weights.audit import kinds_of
    from castalia.weights.findings import KINDS

    for kind, findings in kinds_of(report.findings).items():
        typer.echo(f"{kind}: {KINDS[kind]}")
        for finding in findings[:MOST_OF_A_KIND]:
            typer.echo(f"  {finding.where}: {finding.what}")
        if len(findings) > MOST_OF_A_KIND:
            typer.echo(f"  and {len(findings) - MOST_OF_A_KIND} more; --json lists all")
    read = report.checked
    models = "1 model" if read["models"] == 1 else f"{read['models']} models"
    typer.echo(
        f"read {read['revisions']} checkpoints of {models}, {read['tensors']}"
        f" tensors, {size_text(read['bytes'])}: {words(len(report.findings))}"
    )


def words(count: int) -> str:
    """How many findings."""
    if count == 0:
        return "nothing found"
    return "1 finding" if count == 1 else f"{count} findings"
