"""`castalia suite`: several models on one stream, planned, trained, watched and verified."""

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import AsJson, grouped, note, panel

if TYPE_CHECKING:
    from castalia.suites import Suite
    from castalia.suites.planning import SuitePlan

WHAT = panel("One of")
CHOICE = panel("Members")
PLAN = panel("With --plan")


@dataclass(frozen=True)
class ActionFlags:
    """What to do with the members."""

    plan: Annotated[bool, WHAT("--plan", help="Tokens, FLOPs, GPU-hours and disk of each run.")] = (
        False
    )
    run: Annotated[bool, WHAT("--run", help="Train the members, one after the other.")] = False
    status: Annotated[bool, WHAT("--status", help="How far each member is; the default.")] = False
    verify: Annotated[
        bool, WHAT("--verify", help="Audit checkpoints, seeds and batches of all members.")
    ] = False
    page: Annotated[
        str | None,
        WHAT("--page", metavar="FILE", help="FILE.html: loss against tokens, seconds and FLOPs."),
    ] = None

    @property
    def chosen(self) -> str:
        """The name of the action.

        Raises  ConfigError if there are two.
        """
        from castalia.core.errors import ConfigError

        # A page of no name is a page, too: its file is refused where it is written.
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        names = [name for name, value in given if value not in (None, False)]
        if len(names) > 1:
            raise ConfigError(f"--{names[0]} and --{names[1]}: one of them at a time")
        return names[0] if names else "status"


@dataclass(frozen=True)
class MemberFlags:
    """Which members."""

    only: Annotated[
        str | None, CHOICE(metavar="70m,160m", help="Sizes, data variants or members.")
    ] = None
    seeds: Annotated[
        str | None, CHOICE(metavar="0,1", help="Seeds, of those that the suite has.")
    ] = None


@dataclass(frozen=True)
class PlanFlags:
    """Options of the plan."""

    gpu: Annotated[str, PLAN(help="GPU of the hours: a100-40, h100, h200, ...")] = "a100-40"
    mfu: Annotated[
        float, PLAN(metavar="SHARE", help="Share of its peak that training reaches.")
    ] = 0.3


@grouped
def suite(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SUITE [a.b=c ...]",
            help="mini, zoo, pythia, a YAML file or the folder of a suite; then overrides of all"
            " members, and output=FOLDER.",
        ),
    ],
    action: ActionFlags,
    members: MemberFlags,
    planning: PlanFlags,
    as_json: AsJson = False,
) -> None:
    """Train several models on one stream of data: sizes x data variants x seeds.

    A suite is a short YAML file, or known by name. Each member is a run of `castalia train` in the
    suite's folder; the same command again goes on where it stopped. Members of one data variant and
    data seed read equal batches, which --status compares.

    Examples:

      castalia suite mini --run

      castalia suite zoo --page zoo.html

      castalia suite pythia --plan --only 70m,160m --seeds 1,2

      castalia suite mine.yaml --status --json
    """
    from castalia.suites import open_suite

    chosen = action.chosen
    opened = open_suite(words, members.only, members.seeds)
    if chosen == "run":
        run_members(opened, as_json)
    elif chosen == "plan":
        show_plan(opened, planning.gpu, planning.mfu, as_json)
    elif chosen == "verify":
        verify_members(opened, as_json)
    elif action.page is not None:
        write_page(opened, action.page, as_json)
    else:
        show_status(opened, as_json)


def show_plan(opened: "Suite", gpu: str, mfu: float, as_json: bool) -> None:
    """Print what each member will cost, and all together.

    Raises  ConfigError for a share outside of 0 to 1.
    """
    from castalia.cli.scaling import print_table
    from castalia.core.errors import ConfigError
    from castalia.suites.planning import plan_suite

    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: expected a share of the peak above 0 and at most 1")
    planned = plan_suite(opened, gpu, mfu)
    if as_json:
        typer.echo(json.dumps(planned.as_dict(), indent=2))
        return
    header = ["run", "parameters", "steps", "tokens", "FLOPs", "GPU-hours", "published"]
    print_table([*header, "checkpoints", "disk", "weights alone"], plan_rows(planned))
    typer.echo("")
    typer.echo(
        f"GPU-hours: {gpu} at {mfu:.0%} of its peak (--gpu, --mfu). Published: GPU-hours of the"
        " paper, and the share of the peak that they mean. Disk: fp32 weights and optimizer state."
    )


def plan_rows(planned: "SuitePlan") -> list[list[str]]:
    """The rows of the table, and one with the sums."""
    rows = []
    for run in planned.runs:
        published = "-"
        if run.published_gpu_hours is not None:
            published = f"{run.published_gpu_hours:,} ({run.published_mfu:.0%})"
        first = [run.name, f"{run.parameters:,}", f"{run.steps:,}"]
        rows.append([*first, *cost_cells(run._asdict(), published)])
    total = planned.total
    hours = total["published_gpu_hours"]
    published = f"{hours:,}" if hours else "-"
    last = [f"{total['runs']} runs", "", ""]
    return [*rows, [*last, *cost_cells(total, published)]]


def cost_cells(cost: dict[str, Any], published: str) -> list[str]:
    """The columns that have sums."""
    from castalia.cli.timing import number
    from castalia.monitor.display import quantity, size_text

    return [
        quantity(cost["tokens"]),
        f"{cost['flops']:.3g}",
        number(cost["gpu_hours"]),
        published,
        f"{cost['checkpoints']:,}",
        size_text(cost["disk_bytes"]),
        size_text(cost["weight_bytes"]),
    ]


def run_members(opened: "Suite", as_json: bool) -> None:
    """Train, and exit with an error if a member failed; as JSON, print the status behind it."""
    from castalia.core.errors import TrainingError
    from castalia.suites.running import run_suite

    outcomes = run_suite(opened, note if as_json else typer.echo)
    if as_json:
        show_status(opened, as_json)
    failed = [outcome.member.name for outcome in outcomes if outcome.failed]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} members failed: {', '.join(failed)}; the same"
            " command tries them again"
        )
    if not as_json:
        typer.echo(f"done: {len(outcomes)} members in {opened.folder}")


def verify_members(opened: "Suite", as_json: bool) -> None:
    """Print what is wrong, and exit with 1 if anything is."""
    from castalia.cli.audit import print_report
    from castalia.suites.verifying import verify_suite
    from castalia.terminal.progress import counted_progress

    with counted_progress("audit") as advance:
        report = verify_suite(opened, advance)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)
    if not report.ok:
        raise typer.Exit(1)


def write_page(opened: "Suite", path: str, as_json: bool) -> None:
    """Write the page about the members; as JSON, print its path."""
    from castalia.suites.page import write_suite_page

    written = write_suite_page(opened, path)
    typer.echo(json.dumps({"page": str(written)}) if as_json else f"wrote {written}")


def show_status(opened: "Suite", as_json: bool) -> None:
    """Print how far each member is, and whether their batches are equal."""
    from castalia.cli.scaling import print_table
    from castalia.suites.batches import compare_batches
    from castalia.suites.status import status_of

    states = status_of(opened)
    streams = compare_batches(opened)
    if as_json:
        values: dict[str, Any] = {"suite": opened.name, "folder": str(opened.folder)}
        values["members"] = [state._asdict() for state in states]
        values["streams"] = [stream._asdict() for stream in streams]
        typer.echo(json.dumps(values, indent=2))
        return
    header = ["member", "parameters", "step", "loss", "state", "checkpoints", "data seed"]
    print_table(header, [state.cells() for state in states])
    typer.echo("")
    for stream in streams:
        typer.echo(stream.text)
