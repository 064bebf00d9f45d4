"""`castalia launch`: start a run on many processes, hosts or through a scheduler."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from castalia.launch.plan import LaunchPlan

SOURCES = typer.Argument(
    metavar="CONFIG... [a.b=c ...]", help="What `castalia train` takes: preset, files, overrides."
)


def launch(
    sources: Annotated[list[str], SOURCES],
    launcher: Annotated[str | None, typer.Option(help="torchrun, slurm, mpi or pdsh.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Hosts.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of each host, one process each.")
    ] = None,
    procs_per_node: Annotated[
        int | None, typer.Option(help="Processes on each host, on CPUs.")
    ] = None,
    hostfile: Annotated[str | None, typer.Option(help="File with lines `host slots=N`.")] = None,
    include: Annotated[str | None, typer.Option(help="Use only these: host1:0,2@host2.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Use all but these.")] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Host on which the processes meet.")
    ] = None,
    master_port: Annotated[int | None, typer.Option(help="Port on which they meet.")] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="torchrun on several hosts: number of this one.")
    ] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="Times that a failed run starts again by itself.")
    ] = None,
    launcher_args: Annotated[
        str | None, typer.Option(help="More arguments for the launcher itself.")
    ] = None,
    slurm: Annotated[
        list[str] | None, typer.Option(help="Option of sbatch, time=04:00:00; may be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=value for every process; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and start nothing.")
    ] = False,
) -> None:
    """Start `castalia train CONFIG` on many processes. The options are those of the config's section `launch`.

    Examples:

      castalia launch debug --procs-per-node 2

      castalia launch pythia-1b --launcher slurm --nodes 4 --gpus-per-node 8 --slurm time=04:00:00 --slurm account=a

      castalia launch pythia-1b --launcher pdsh --hostfile hosts --include host1:0,1@host2 --dry-run
    """
    given = {
        key: value
        for key, value in locals().items()
        if key not in ("sources", "slurm", "env", "dry_run")
    }
    words = [
        f"launch.{key}={json.dumps(value)}" for key, value in given.items() if value is not None
    ]
    words += [*pairs("slurm", "launch.slurm", slurm), *pairs("env", "launch.environment", env)]
    plan = make_plan(sources, words)
    if dry_run:
        typer.echo(describe(plan))
        return
    from castalia.launch.starting import start

    raise typer.Exit(start(plan))


def pairs(option: str, section: str, given: list[str] | None) -> list[str]:
    """`key=value` of a repeated option as overrides of a section.

    Raises  ConfigError for one without `=`.
    """
    from castalia.core.errors import ConfigError

    wrong = [text for text in given or [] if not text.partition("=")[0] or "=" not in text]
    if wrong:
        raise ConfigError(f"--{option} {wrong[0]!r}: expected key=value")
    flags = {"true": True, "false": False} if option == "slurm" else {}
    split = [text.partition("=")[::2] for text in given or []]
    return [f"{section}.{key}={json.dumps(flags.get(value, value))}" for key, value in split]


def make_plan(sources: list[str], words: list[str]) -> "LaunchPlan":
    """Read and check the config as it will be read on every process.

    Raises  ConfigError if the config, the hosts or the layout is wrong.
    """
    from castalia.distributed import check_layout
    from castalia.launch.plan import LaunchPlan, hosts_for
    from castalia.recipes import resolve

    launch = resolve([*sources, *words]).config.launch
    hosts = hosts_for(launch)
    size = sum(len(slots) for slots in hosts.values())
    config = resolve([*sources, *words], world=size).config
    check_layout(config.parallel, size)
    command = ["-m", "castalia", "train", *sources]
    return LaunchPlan(launch, hosts, command, Path(config.output).absolute(), config.train.steps)


def describe(plan: "LaunchPlan") -> str:
    """What would run, as text for a shell; for Slurm the job's script as well."""
    import shlex

    from castalia.launch.commands import BUILDERS
    from castalia.launch.slurm import sbatch_file, sbatch_script

    command = shlex.join(BUILDERS[plan.config.launcher](plan))
    local = plan.config.launcher == "torchrun"
    variables = (
        "".join(f"{n}={shlex.quote(v)} " for n, v in plan.config.environment.items())
        if local
        else ""
    )
    script = (
        f"# {sbatch_file(plan)}\n{sbatch_script(plan)}\n" if plan.config.launcher == "slurm" else ""
    )
    return f"{script}{variables}{command}"
