"""`castalia intervene`: what a change of the text would do to the steps of a run, and the branch
that is trained with it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import AsJson, note, notes_aside

if TYPE_CHECKING:
    from castalia.interventions.report import Report
    from castalia.studies.branching import Branch

SHOWN = 60
"""Characters of a text in an example."""

Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Changes = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE|a.b=c...",
        help="YAML files with `interventions:`, or interventions=[{kind: swap, …}]; other overrides"
        " go to branch and control alike.",
    ),
]
At = Annotated[
    str,
    typer.Option(metavar="STEP|93%", help="First step, or share of the run, whose rows change."),
]
Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the branch; by default its kinds.")
]
Train = Annotated[
    bool,
    typer.Option(
        "--run/--dry-run",
        help="Train branch and control, or only report what changes.",
    ),
]
Steps = Annotated[
    str | None,
    typer.Option("--steps", metavar="A:B", help="Steps to report; by default all that change."),
]
Examples = Annotated[int, typer.Option(metavar="N", min=0, help="Changes to show.")]


def intervene(
    run: Run,
    changes: Changes,
    at: At,
    name: Name = None,
    train: Train = False,
    steps: Steps = None,
    examples: Examples = 5,
    as_json: AsJson = False,
) -> None:
    """Change what a run reads from some step on, all else equal.

    Without --run it reports which rows and tokens change, and shows examples. With --run it trains
    two branches from the newest checkpoint up to --at, with the run's optimizer and place in the
    data: the control, which changes nothing and must end in the run's own weights, bit by bit, and
    the branch. Their folders are RUN-from-STEP-control and RUN-from-STEP-NAME.

    Examples:

      castalia intervene runs/demo swap.yaml --at 93%

      castalia intervene runs/demo without.yaml --at 200 --name without --run
    """
    from castalia.runs.rows import rows_as_trained
    from castalia.stream.same_data import require_files
    from castalia.studies.branching import plan_branch, train_branch
    from castalia.studies.dry_runs import reported, require_allowed

    branch = plan_branch(run, at, changes, name=name)
    planned = branch.planned
    require_files(planned, Path(planned.output))
    if train:
        require_allowed(branch)
        with notes_aside(as_json):
            result = train_branch(branch, typer.echo)
        print_result(result, as_json)
        return
    _, rows = rows_as_trained(planned, note)
    report = reported(rows, branch, steps, examples)
    if as_json:
        facts = {"at": branch.at, "checkpoint": branch.checkpoint, "name": branch.name}
        typer.echo(json.dumps(facts | report.as_json(), ensure_ascii=False))
    else:
        print_report(report, branch)


def print_report(report: "Report", branch: "Branch") -> None:
    """The report in lines."""
    typer.echo(
        f"steps {report.first} to {report.stop - 1}: {report.rows_changed:,} of {report.rows:,}"
        f" rows change, {report.tokens_changed:,} of {report.tokens:,} tokens ({report.share:.3%})"
    )
    for source, (rows, tokens) in report.by_source.items():
        typer.echo(f"  {source}: {rows:,} rows, {tokens:,} tokens")
    if report.targets_ignored:
        typer.echo(f"  {report.targets_ignored:,} tokens are no targets any more")
    for reason, count in report.left_out.items():
        typer.echo(f"  left out: {count:,} changes, {reason}")
    if report.rows_refused:
        typer.echo(f"  training would stop: {report.rows_refused:,} rows; {report.refused[0]}")
    for example in report.examples:
        place = f"step {example.step}, row {example.row}, {example.source} {example.document}"
        typer.echo(f"  {place}: {shown(example.before)} -> {shown(example.after)}")
    typer.echo(
        f"--run trains branch and control from checkpoint {branch.checkpoint} on:"
        f" {branch.folder(branch.name)}"
    )


def shown(text: str) -> str:
    """A text of an example on one line."""
    cut = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    return repr(cut)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """What became of branch and control."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    compared = result["control_and_run"]
    steps = ", ".join(map(str, compared["steps"]))
    if compared["equal"] is None:
        typer.echo("control: the run has no later checkpoint to compare it with")
    elif compared["equal"]:
        typer.echo(f"control: equal to the run, bit by bit, in checkpoints {steps}")
    else:
        first = compared["difference"]
        typer.echo(
            f"control: differs from the run first in checkpoint {first['step']}, {first['tensor']},"
            f" by {first['largest']}"
        )
    changed = result["steps_with_other_rows"]
    typer.echo(f"branch: {len(changed):,} steps read other rows than the control")
