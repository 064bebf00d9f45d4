"""The command that starts a launch plan, for torchrun, Open MPI and pdsh. Builds text, starts
nothing."""

import os
import shlex
from collections.abc import Callable

from castalia.core.errors import ConfigError
from castalia.core.starter import STARTER
from castalia.launch.plan import LaunchPlan, passed_variables
from castalia.launch.slurm import sbatch_command

TOOLS = {
    "sbatch": (
        "Slurm",
        "apt-get install slurm-client, or `module load slurm` on a cluster's login node",
    ),
    "mpirun": ("Open MPI", "apt-get install openmpi-bin, or `module load openmpi` on a cluster"),
    "pdsh": ("pdsh", "apt-get install pdsh"),
    "ssh": ("OpenSSH", "apt-get install openssh-client"),
}
"""Program -> the package it belongs to, and how to install it."""
NEEDED = {"torchrun": (), "slurm": ("sbatch",), "mpi": ("mpirun",), "pdsh": ("pdsh", "ssh")}
"""Launcher -> the programs it calls."""


def torchrun(plan: LaunchPlan) -> list[str]:
    """torchrun on this machine; with several hosts, the same command runs on each of them."""
    config = plan.config
    words = torchrun_words(plan)
    if len(plan.hosts) == 1:
        # --standalone finds a free port itself, so that two runs on one machine do not collide.
        words += ["--standalone", "--local-addr=127.0.0.1"]
    elif config.master_addr is None and not plan.hosts_are_named:
        raise ConfigError(
            f"{len(plan.hosts)} hosts need a rendezvous on one of them; name it with --master-addr"
        )
    else:
        words += rendezvous_words(plan)
    words.append(f"--nproc-per-node={plan.ranks_per_node}")
    if len(plan.hosts) > 1 and config.node_rank is not None:
        words.append(f"--rdzv-conf=is_host={int(config.node_rank == 0)}")
    return [*words, *shlex.split(config.launcher_args), *plan.command]


def torchrun_words(plan: LaunchPlan) -> list[str]:
    """The beginning of every torchrun command."""
    # -m, because a virtual environment on another host may have its `torchrun` off the PATH.
    restarts = f"--max-restarts={plan.config.max_restarts}"
    return [plan.python, "-m", "torch.distributed.run", restarts]


def rendezvous_words(plan: LaunchPlan) -> list[str]:
    """Arguments of torchrun with which several hosts find each other."""
    return [
        f"--nnodes={len(plan.hosts)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={bracketed(plan.master)}:{plan.config.master_port}",
        f"--rdzv-id={plan.output.name or 'run'}",
    ]


def bracketed(host: str) -> str:
    """The host before a port: an IPv6 address has colons of its own and needs brackets."""
    return f"[{host}]" if ":" in host else host


def mpi(plan: LaunchPlan) -> list[str]:
    """Open MPI's mpirun; ranks find rank 0 by MASTER_ADDR and MASTER_PORT."""
    config = plan.config
    plan.require_first_slots()
    require_plain_names(plan)
    variables = {"MASTER_ADDR": plan.master, "MASTER_PORT": str(config.master_port)}
    # Local ranks inherit the whole environment; on other hosts mpirun starts from an empty one.
    variables |= plan.variables if plan.is_local else passed_variables(config)
    places = ",".join(f"{host}:{len(slots)}" for host, slots in plan.hosts.items())
    words = ["mpirun", "-np", str(plan.world_size), "--host", places]
    # Ranks fill the slots of a host in order. Binding each to one core would starve its threads.
    words += ["--map-by", "slot", "--bind-to", "none"]
    if not plan.is_local:
        words += ["--wdir", os.getcwd()]
    for name, value in variables.items():
        words += ["-x", f"{name}={value}"]
    return [*words, *shlex.split(config.launcher_args), plan.python, *plan.command]


def require_plain_names(plan: LaunchPlan) -> None:
    """Check that mpirun can be told the names of the hosts, which it takes as `host:N`.

    Raises  ConfigError if not.
    """
    for host in plan.hosts:
        if "@" in host:
            user, _, name = host.partition("@")
            raise ConfigError(
                f"host {host}: mpirun takes no user; write `User {user}` for `Host {name}` in"
                " ~/.ssh/config and drop it from the hostfile, or use --launcher pdsh"
            )
        if ":" in host:
            raise ConfigError(
                f"host {host}: mpirun takes no IPv6 address; give the host a name in /etc/hosts, or"
                " use --launcher pdsh"
            )


def pdsh(plan: LaunchPlan) -> list[str]:
    """pdsh, which starts one torchrun per host over ssh and replaces %n by the host's number."""
    # The number of the host's shell, which becomes that of torchrun: the ranks end with it.
    lines = [f"cd {quoted(os.getcwd())}", f"export {STARTER}=$$"]
    for name, value in passed_variables(plan.config).items():
        lines.append(f"export {name}={quoted(value)}")
    if plan.selects_slots or not plan.is_uniform:
        lines.append(slots_by_host(plan))
        ranks = "$procs"
    else:
        ranks = str(plan.ranks_per_node)
    words = [*torchrun_words(plan), *rendezvous_words(plan)]
    start = " ".join(quoted(word) for word in words)
    arguments = [*shlex.split(plan.config.launcher_args), *plan.command]
    rest = " ".join(quoted(word) for word in arguments)
    # `%n == 0` holds on one host only, which then owns the rendezvous, whatever its names are.
    lines.append(f"exec {start} --nproc-per-node={ranks} --rdzv-conf=is_host=$((%n == 0)) {rest}")
    # -S returns the largest exit status, -b ends all hosts at one Ctrl-C, -f starts all at once.
    options = ["-S", "-b", "-R", "ssh", "-f", str(len(plan.hosts))]
    return ["pdsh", *options, "-w", ",".join(plan.hosts), "; ".join(lines)]


def slots_by_host(plan: LaunchPlan) -> str:
    """Shell code that sets, by the host's number, its number of ranks and the GPUs they use."""
    arms = []
    for number, slots in enumerate(plan.hosts.values()):
        gpus = ",".join(map(str, slots))
        arms.append(f"{number}) procs={len(slots)}; export CUDA_VISIBLE_DEVICES={gpus};;")
    return f"case %n in {' '.join(arms)} esac"


def quoted(word: str) -> str:
    """A word quoted for the shell of another host; % is doubled, because pdsh expands it."""
    return shlex.quote(word).replace("%", "%%")


BUILDERS: dict[str, Callable[[LaunchPlan], list[str]]] = {
    "torchrun": torchrun,
    "mpi": mpi,
    "pdsh": pdsh,
    "slurm": sbatch_command,
}
"""Launcher -> the function that builds its command."""
