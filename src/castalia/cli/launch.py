"""`castalia launch`: start a run on many processes, on several hosts or through a scheduler."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.terminal.flags import Config, ConfigFolder, grouped, panel

if TYPE_CHECKING:
    from castalia.launch.plan import LaunchPlan

HOSTS = panel("Hosts and processes")
START = panel("Start")


@dataclass(frozen=True)
class HostFlags:
    """Options about the hosts and the processes on each; keys of the config's section `launch`."""

    nodes: Annotated[int | None, HOSTS(metavar="N", help="Number of hosts.")] = None
    gpus_per_node: Annotated[
        int | None, HOSTS(metavar="N", help="GPUs of each host, one process each.")
    ] = None
    procs_per_node: Annotated[
        int | None, HOSTS(metavar="N", help="Processes on each host, on CPUs.")
    ] = None
    hostfile: Annotated[
        str | None, HOSTS(metavar="FILE", help="File with lines `host slots=N`.")
    ] = None
    include: Annotated[
        str | None, HOSTS(metavar="HOSTS", help="Use only these: host1:0,2@host2.")
    ] = None
    exclude: Annotated[str | None, HOSTS(metavar="HOSTS", help="Use all but these.")] = None
    master_addr: Annotated[
        str | None, HOSTS(metavar="HOST", help="Host on which the processes meet.")
    ] = None
    master_port: Annotated[int | None, HOSTS(metavar="N", help="Port on which they meet.")] = None
    node_rank: Annotated[
        int | None, HOSTS(metavar="N", help="torchrun on several hosts: number of this host.")
    ] = None


@dataclass(frozen=True)
class StartFlags:
    """Options about how the processes start; keys of the config's section `launch`."""

    launcher: Annotated[str | None, START(help="torchrun, slurm, mpi or pdsh.")] = None
    max_restarts: Annotated[
        int | None, START(metavar="N", help="Restarts of a failed run from its newest checkpoint.")
    ] = None
    launcher_args: Annotated[
        str | None, START(metavar="ARGS", help="More arguments for the launcher itself.")
    ] = None


@grouped
def launch(
    config: Config,
    conf_dir: ConfigFolder = None,
    *,
    hosts: HostFlags,
    start: StartFlags,
    slurm: Annotated[
        list[str] | None,
        START(metavar="KEY=VALUE", help="Option of sbatch, time=04:00:00; may be repeated."),
    ] = None,
    env: Annotated[
        list[str] | None,
        START(metavar="NAME=VALUE", help="Variable of every process; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, START("--dry-run", help="Print the commands without starting anything.")
    ] = False,
) -> None:
    """Start `castalia train CONFIG` on many processes.

    The options override the section `launch` of the config.

    Examples:

      castalia launch debug --procs-per-node 2

      castalia launch pythia-1b --launcher slurm --nodes 4 --gpus-per-node 8

      castalia launch pythia-1b --launcher pdsh --hostfile hosts --dry-run
    """
    words = []
    for key, value in (asdict(hosts) | asdict(start)).items():
        if value is not None:
            words.append(f"launch.{key}={json.dumps(value)}")
    words += pairs("slurm", "launch.slurm", slurm or [])
    words += pairs("env", "launch.environment", env or [])
    from castalia.recipes import in_folder

    # Resolved here: the ranks get the files' paths.
    plan = make_plan(in_folder(conf_dir, config), words)
    if dry_run:
        typer.echo(describe(plan))
        return
    from castalia.launch.starting import start as start_processes

    raise typer.Exit(start_processes(plan))


def pairs(option: str, section: str, texts: list[str]) -> list[str]:
    """`key=value` of a repeated option as overrides of a section.

    Raises  ConfigError for one without `=`.
    """
    from castalia.core.errors import ConfigError

    # sbatch has flags, which take true and false; a variable is text whatever it says.
    flags = {"true": True, "false": False} if option == "slurm" else {}
    overrides = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--{option} {text!r}: expected key=value")
        overrides.append(f"{section}.{key}={json.dumps(flags.get(value, value))}")
    return overrides


def make_plan(config_words: list[str], launch_words: list[str]) -> "LaunchPlan":
    """Read and check the config as every process will read it.

    Raises  ConfigError if the config, the hosts or the layout is wrong.
    """
    from castalia.config.credentials import require_no_credentials
    from castalia.distributed import check_layout
    from castalia.launch.plan import LaunchPlan, hosts_for, names_hosts
    from castalia.recipes import resolve

    words = [*config_words, *launch_words]
    resolved = resolve(words)
    require_no_credentials(resolved.config)
    launch = resolved.config.launch
    notes = resolved.launch_notes
    was_typed = any(word.startswith("launch.launcher=") for word in words)
    if launch.launcher == "pdsh" and not was_typed and not names_hosts(launch):
        # DeepSpeed starts on this machine where a file names its launcher but no hostfile.
        launch = launch.model_copy(update={"launcher": "torchrun"})
        notes = [*notes, "launcher pdsh has no hostfile: torchrun starts the ranks on this machine"]
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    hosts = hosts_for(launch)
    # Read again with the world size: a GPT-NeoX file may leave its batch to that.
    size = sum(len(slots) for slots in hosts.values())
    config = resolve(words, world=size).config
    check_layout(config.parallel, size)
    command = ["-m", "castalia", "train", *config_words]
    return LaunchPlan(launch, hosts, command, Path(config.output).absolute(), config.train.steps)


def describe(plan: "LaunchPlan") -> str:
    """The commands of a launch as a shell takes them; for Slurm the job's script as well."""
    import shlex

    from castalia.launch.commands import BUILDERS
    from castalia.launch.slurm import sbatch_file, sbatch_script

    command = shlex.join(BUILDERS[plan.config.launcher](plan))
    if plan.config.launcher == "slurm":
        return f"# {sbatch_file(plan)}\n{sbatch_script(plan)}\n{command}"
    if plan.config.launcher == "torchrun":
        # torchrun inherits the variables; the other launchers carry them in their command.
        for name, value in reversed(plan.variables.items()):
            command = f"{name}={shlex.quote(value)} {command}"
    return command
