"""Which process am I, and where is rank 0: read from what torchrun, Open MPI, MPICH, Slurm or jsrun set.

Needs no torch. Sources: Open MPI's, hydra's and Slurm's manual pages of mpirun, mpiexec and srun; IBM's of jsrun.
"""

import os
import re
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from castalia.core.errors import ConfigError

PORT = 29500
"""Where rank 0 listens when nobody says another port; torchrun's default, too."""


class Launcher(NamedTuple):
    """The variables in which one launcher tells a process its place."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    """Names of which one is set, the first that is counts."""


LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",)),
    Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)
    ),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", ("JSM_NAMESPACE_LOCAL_RANK",)),
    Launcher(
        "PMI",
        "PMI_RANK",
        "PMI_SIZE",
        ("PMI_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
    ),
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but only a task of srun's has a step.
    Launcher("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
)
"""In this order: mpirun inside a Slurm job starts its daemons with srun, whose variables then count hosts."""


def environment(variables: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, number of processes, rank on this host); (0, 1, 0) without a launcher.

    Raises  ConfigError if a launcher's variables are incomplete or no numbers.
    """
    launcher = started_by(variables)
    if launcher is None:
        return 0, 1, 0
    rank, size = (
        number(variables, launcher, launcher.rank),
        number(variables, launcher, launcher.size),
    )
    local = next((name for name in launcher.local_rank if variables.get(name)), None)
    if local is None and size > 1:
        raise ConfigError(
            f"{launcher.name} set {launcher.rank}={rank} but no rank on the host; set LOCAL_RANK, RANK and WORLD_SIZE"
        )
    local_rank = number(variables, launcher, local) if local else 0
    if not 0 <= rank < size:
        raise ConfigError(
            f"{launcher.rank}={rank} is not among the {size} processes of {launcher.size}"
        )
    return rank, size, local_rank


def world_size(variables: Mapping[str, str] = os.environ) -> int:
    """Number of processes that a run here has; WORLD_SIZE alone plans for as many without starting one.

    Raises  ConfigError if a launcher's variables are incomplete or no numbers.
    """
    planned = variables.get("WORLD_SIZE")
    if not planned or variables.get("RANK"):
        return environment(variables)[1]
    if not planned.isdigit() or int(planned) < 1:
        raise ConfigError(f"WORLD_SIZE={planned!r} is no number of processes")
    return int(planned)


def started_by(variables: Mapping[str, str]) -> Launcher | None:
    """The launcher whose variables are set, or None."""
    for launcher in LAUNCHERS:
        found = [name for name in (launcher.rank, launcher.size) if variables.get(name)]
        if len(found) == 2:
            return launcher
        if found and launcher.name != "Slurm":
            missing = launcher.size if found == [launcher.rank] else launcher.rank
            raise ConfigError(
                f"{found[0]} is set but {missing} is not; set both or none ({launcher.name}'s variables)"
            )
    return None


def number(variables: Mapping[str, str], launcher: Launcher, name: str) -> int:
    """The whole number in a variable."""
    try:
        return int(variables[name])
    except ValueError:
        raise ConfigError(
            f"{name}={variables[name]!r} of {launcher.name} is no whole number"
        ) from None


def rendezvous(variables: Mapping[str, str] = os.environ) -> str:
    """Where the processes meet, as torch's init_method: `env://` under torchrun, else `tcp://host:port` of rank 0.

    MASTER_ADDR and MASTER_PORT count when set. Without them the host of rank 0 is this one when all processes are
    on it, the first of the job's hosts under Slurm and jsrun; the port under Slurm follows the job's number.
    Raises  ConfigError if rank 0's host cannot be told.
    """
    launcher = started_by(variables)
    if launcher is None or launcher.name == "torchrun":
        return "env://"
    host = variables.get("MASTER_ADDR") or first_host(launcher, variables)
    if host is None:
        raise ConfigError(
            f"{launcher.name} started the processes on several hosts and does not say which has rank 0;"
            " set MASTER_ADDR, for instance `mpirun -x MASTER_ADDR=host`, or use `castalia launch --launcher mpi`"
        )
    return f"tcp://{host}:{variables.get('MASTER_PORT') or default_port(variables)}"


def default_port(variables: Mapping[str, str]) -> int:
    """A port that two jobs on one host do not share: from Slurm's job number, else 29500."""
    job = variables.get("SLURM_JOB_ID", "")
    return 20000 + int(job) % 10000 if job.isdigit() else PORT


def first_host(launcher: Launcher, variables: Mapping[str, str]) -> str | None:
    """The host of rank 0 where the launcher's variables tell it."""
    alone = {
        "Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMI": "MPI_LOCALNRANKS",
        "jsrun": "JSM_NAMESPACE_LOCAL_SIZE",
    }
    if variables.get(alone.get(launcher.name, ""), "") == variables[launcher.size]:
        return "127.0.0.1"
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if nodes and launcher.name != "jsrun":
        return node_list(nodes)[0]
    # LSF lists `host slots` pairs; the first is the launch node, on which jsrun starts nothing.
    pairs = variables.get("LSB_MCPU_HOSTS", "").split()
    return pairs[2] if launcher.name == "jsrun" and len(pairs) >= 4 else None


def node_list(text: str) -> list[str]:
    """Slurm's compact host list in full: `gpu[01-03,07],login` -> gpu01 gpu02 gpu03 gpu07 login.

    Raises  ConfigError if it is none.
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", text):
        raise ConfigError(f"{text!r} is no host list of Slurm's, such as gpu[01-03,07]")
    out = []
    for item in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        parts = re.split(r"\[([^\]]*)\]", item)
        choices = [numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        out += ["".join(words) for words in product(*choices)]
    return out


def numbers(text: str) -> list[str]:
    """`01-03,07` -> 01 02 03 07, with their leading zeros."""
    out = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        out += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return out
