"""The command that starts a plan, for torchrun, Open MPI and pdsh. Pure text; needs no torch and starts nothing."""

import os
import shlex
from collections.abc import Callable

from castalia.core.errors import ConfigError
from castalia.launch.launching import Plan, passed_variables
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
"""Program -> what it belongs to, and how to get it."""
NEEDED = {"torchrun": (), "slurm": ("sbatch",), "mpi": ("mpirun",), "pdsh": ("pdsh", "ssh")}
"""Launcher -> programs that it calls."""


def torchrun(plan: Plan) -> list[str]:
    """torchrun on this machine; with more hosts the same line runs on each of them."""
    config = plan.config
    words = [plan.python, "-m", "torch.distributed.run", f"--max-restarts={config.max_restarts}"]
    if len(plan.hosts) == 1:
        words += ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={plan.per_node}"]
    else:
        if config.master_addr is None and not plan.named:
            raise ConfigError(
                f"{len(plan.hosts)} nodes meet at one of them; name it with --master-addr"
            )
        words += [*meeting(plan), f"--nproc-per-node={plan.per_node}"]
        if config.node_rank is not None:
            words.append(f"--rdzv-conf=is_host={int(config.node_rank == 0)}")
    return [*words, *shlex.split(config.launcher_args), *plan.command]


def meeting(plan: Plan) -> list[str]:
    """Arguments of torchrun by which several hosts find each other."""
    endpoint = f"{plan.master}:{plan.config.master_port}"
    name = plan.output.name or "run"
    return [
        f"--nnodes={len(plan.hosts)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={name}",
    ]


def mpi(plan: Plan) -> list[str]:
    """mpirun of Open MPI; the processes find rank 0 by MASTER_ADDR and MASTER_PORT."""
    config = plan.config
    if plan.picked:
        plan.per_node  # noqa: B018
    places = ",".join(f"{host}:{len(slots)}" for host, slots in plan.hosts.items())
    local = list(plan.hosts) == ["localhost"]
    known = {"MASTER_ADDR": plan.master, "MASTER_PORT": str(config.master_port)}
    variables = known | (config.environment if local else passed_variables(config))
    words = [
        "mpirun",
        "-np",
        str(plan.size),
        "--host",
        places,
        "--map-by",
        "slot",
        "--bind-to",
        "none",
    ]
    if not local:
        words += ["--wdir", os.getcwd()]
    for name, value in variables.items():
        words += ["-x", f"{name}={value}"]
    return [*words, *shlex.split(config.launcher_args), plan.python, *plan.command]


def pdsh(plan: Plan) -> list[str]:
    """One torchrun on each host, reached by ssh; pdsh writes the number of the host for %n."""
    config = plan.config
    variables = passed_variables(config)
    lines = [f"cd {quoted(os.getcwd())}"]
    lines += [f"export {name}={quoted(value)}" for name, value in variables.items()]
    count = (
        "$procs"
        if plan.picked or len({len(slots) for slots in plan.hosts.values()}) > 1
        else str(plan.per_node)
    )
    if count == "$procs":
        lines.append(cases(plan))
    words = [
        plan.python,
        "-m",
        "torch.distributed.run",
        f"--max-restarts={config.max_restarts}",
        *meeting(plan),
    ]
    start = " ".join(quoted(word) for word in words)
    rest = " ".join(quoted(word) for word in [*shlex.split(config.launcher_args), *plan.command])
    # %n is -eq 0 on one host only, which then holds the rendezvous whatever its names are
    lines.append(f"exec {start} --nproc-per-node={count} --rdzv-conf=is_host=$((%n == 0)) {rest}")
    # -S hands back the largest exit status, -b ends all at one ctrl-C, -f starts all hosts at once
    return [
        "pdsh",
        "-S",
        "-b",
        "-R",
        "ssh",
        "-f",
        str(len(plan.hosts)),
        "-w",
        ",".join(plan.hosts),
        "; ".join(lines),
    ]


def cases(plan: Plan) -> str:
    """Shell that sets, by the number of the host, how many processes it runs and which GPUs are theirs."""
    arms = [
        f"{i}) procs={len(slots)}; export CUDA_VISIBLE_DEVICES={','.join(map(str, slots))};;"
        for i, slots in enumerate(plan.hosts.values())
    ]
    return f"case %n in {' '.join(arms)} esac"


def quoted(word: str) -> str:
    """A word for the shell of another host, with % doubled, which pdsh would fill in."""
    return shlex.quote(word).replace("%", "%%")


BUILDERS: dict[str, Callable[[Plan], list[str]]] = {
    "torchrun": torchrun,
    "mpi": mpi,
    "pdsh": pdsh,
    "slurm": sbatch_command,
}
"""Launcher -> what makes its command."""
