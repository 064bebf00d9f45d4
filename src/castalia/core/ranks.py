"""This process's rank and the address of rank 0, from the variables that its launcher set.

Launchers: torchrun, Open MPI, MPICH and other PMI launchers, Slurm, jsrun. Needs no torch.
Source  the manual pages of mpirun (Open MPI), mpiexec (hydra), srun (Slurm) and jsrun (IBM).
"""

import os
import re
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from castalia.core.errors import ConfigError

PORT = 29500
"""Default port on which rank 0 listens; torchrun's default as well."""
SLURM_PORTS = range(20000, 30000)
"""Ports from which a Slurm job picks its own: above the privileged ports, below Linux's ephemeral
ones."""


class Launcher(NamedTuple):
    """Names of the variables with which one launcher describes the rank of a process."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    """Candidates for the rank on the host; the first one that is set counts."""


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
    # SLURM_STEP_NUM_TASKS, not SLURM_NTASKS: a batch script has the latter too, but only a task
    # that srun started belongs to a step.
    Launcher("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
)
"""In order of precedence. Slurm is last: mpirun inside a Slurm job starts its daemons with srun, so
SLURM_PROCID then numbers hosts, not ranks."""


def environment(variables: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, world size, rank on this host); (0, 1, 0) without a launcher.

    Raises  ConfigError if a launcher's variables are incomplete, not integers or inconsistent.
    """
    launcher = started_by(variables)
    if launcher is None:
        return 0, 1, 0
    rank = integer(variables, launcher, launcher.rank)
    size = integer(variables, launcher, launcher.size)
    if not 0 <= rank < size:
        raise ConfigError(
            f"{launcher.rank}={rank} is out of range: {launcher.size}={size}, so ranks are 0 to"
            f" {size - 1}; fix the variables that {launcher.name} sets"
        )
    return rank, size, local_rank(variables, launcher, rank, size)


def local_rank(variables: Mapping[str, str], launcher: Launcher, rank: int, size: int) -> int:
    """Rank on this host.

    Raises  ConfigError if the launcher set none of its variables and there are several ranks.
    """
    for name in launcher.local_rank:
        if variables.get(name):
            return integer(variables, launcher, name)
    # A single rank is alone on its host. More would all take GPU 0, so a guess is not safe.
    if size > 1:
        raise ConfigError(
            f"{launcher.name} set {launcher.rank}={rank} but not the rank on the host; set"
            " LOCAL_RANK, RANK and WORLD_SIZE"
        )
    return 0


def world_size(variables: Mapping[str, str] = os.environ) -> int:
    """Number of ranks of a run started here.

    WORLD_SIZE without RANK is a plan for that many ranks, for instance for `castalia show`.
    Raises  ConfigError if a launcher's variables are incomplete, not integers or inconsistent.
    """
    planned = variables.get("WORLD_SIZE")
    if not planned or variables.get("RANK"):
        return environment(variables)[1]
    if not planned.isdigit() or int(planned) < 1:
        raise ConfigError(f"WORLD_SIZE={planned!r} is not a positive integer")
    return int(planned)


def started_by(variables: Mapping[str, str]) -> Launcher | None:
    """The first launcher whose rank and world size are both set; None without a launcher.

    Raises  ConfigError if a launcher set only one of the two.
    """
    for launcher in LAUNCHERS:
        has_rank = bool(variables.get(launcher.rank))
        has_size = bool(variables.get(launcher.size))
        if has_rank and has_size:
            return launcher
        # SLURM_PROCID alone is normal: a batch script has it without being a task of a step.
        if has_rank == has_size or launcher.name == "Slurm":
            continue
        present = launcher.rank
        missing = launcher.size
        if has_size:
            present = launcher.size
            missing = launcher.rank
        raise ConfigError(
            f"{present} is set but {missing} is not; set both or neither"
            f" ({launcher.name}'s variables)"
        )
    return None


def integer(variables: Mapping[str, str], launcher: Launcher, name: str) -> int:
    """The integer in a launcher's variable."""
    try:
        return int(variables[name])
    except ValueError:
        raise ConfigError(
            f"{name}={variables[name]!r} is not an integer; {launcher.name} sets this variable"
        ) from None


def rendezvous(variables: Mapping[str, str] = os.environ) -> str:
    """torch's init_method: `env://` under torchrun, else rank 0's `tcp://host:port`.

    MASTER_ADDR and MASTER_PORT take precedence. The default host is 127.0.0.1 if all ranks are on
    this host, else the first host of the job under Slurm and jsrun. The default port under Slurm
    follows the job's number.
    Raises  ConfigError if rank 0's host is unknown.
    """
    launcher = started_by(variables)
    if launcher is None or launcher.name == "torchrun":
        return "env://"
    host = variables.get("MASTER_ADDR") or first_host(launcher, variables)
    if host is None:
        raise ConfigError(
            f"{launcher.name} started ranks on several hosts but does not name the host of rank 0;"
            " set MASTER_ADDR, for instance `mpirun -x MASTER_ADDR=host`, or use `castalia launch"
            " --launcher mpi`"
        )
    port = variables.get("MASTER_PORT") or default_port(variables)
    return f"tcp://{host}:{port}"


def default_port(variables: Mapping[str, str]) -> int:
    """A port that two jobs on one host do not share: from Slurm's job number, else 29500."""
    job = variables.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return PORT
    return SLURM_PORTS[int(job) % len(SLURM_PORTS)]


LOCAL_SIZES = {
    "Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMI": "MPI_LOCALNRANKS",
    "jsrun": "JSM_NAMESPACE_LOCAL_SIZE",
}
"""Launcher -> its variable for the number of ranks on this host."""


def first_host(launcher: Launcher, variables: Mapping[str, str]) -> str | None:
    """The host of rank 0, as far as the launcher's variables reveal it."""
    local_size = variables.get(LOCAL_SIZES.get(launcher.name, ""), "")
    if local_size == variables[launcher.size]:
        return "127.0.0.1"
    if launcher.name == "jsrun":
        # LSF lists `host slots` pairs. The first is the launch node, on which jsrun starts nothing.
        pairs = variables.get("LSB_MCPU_HOSTS", "").split()
        return pairs[2] if len(pairs) >= 4 else None
    # The step's list first: a step may use fewer hosts than its job has.
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    return node_list(nodes)[0] if nodes else None


NODE_LIST = re.compile(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*")
"""Comma-separated names, in which brackets hold numbers and ranges."""
NODE = re.compile(r"(?:[^\[\],]|\[[^\]]*\])+")
BRACKETS = re.compile(r"\[([^\]]*)\]")


def node_list(text: str) -> list[str]:
    """Expand Slurm's compact host list: `gpu[01-03,07],login` -> gpu01 gpu02 gpu03 gpu07 login.

    Raises  ConfigError if the text is not a Slurm host list.
    """
    if not NODE_LIST.fullmatch(text):
        raise ConfigError(f"{text!r} is not a Slurm host list, such as gpu[01-03,07]")
    hosts = []
    for item in NODE.findall(text):
        # A split by a pattern with one group alternates: text, brackets, text, …
        choices = []
        for position, part in enumerate(BRACKETS.split(item)):
            choices.append(numbers(part) if position % 2 else [part])
        hosts += ["".join(words) for words in product(*choices)]
    return hosts


def numbers(text: str) -> list[str]:
    """Expand `01-03,07` to 01 02 03 07, keeping leading zeros."""
    out = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            out.append(str(number).zfill(len(first)))
    return out
