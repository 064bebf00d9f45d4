"""How a run is started on many processes: what `castalia launch` is asked, and who runs where. Needs no torch."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from castalia.config.base import Config
from castalia.core.errors import ConfigError
from castalia.core.ranks import PORT
from castalia.launch.hostfile import Hosts, choose, read_hostfile


class LaunchConfig(Config):
    """How `castalia launch` starts the processes; training itself reads nothing of this."""

    launcher: Literal["torchrun", "slurm", "mpi", "pdsh"] = "torchrun"
    """torchrun starts this machine's processes, slurm submits a job, mpi calls mpirun, pdsh reaches hosts over ssh."""
    nodes: PositiveInt | None = None
    """Hosts; null takes all of the hostfile, or one."""
    procs_per_node: PositiveInt | None = None
    """Processes on each host; null takes gpus_per_node, the slots of the hostfile, or this machine's GPUs."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each host, one process each; Slurm is asked for them."""
    hostfile: str | None = None
    """File with lines `host slots=N`; the environment's DLTS_HOSTFILE comes before it."""
    include: str = ""
    """Use only these hosts and slots of the hostfile: `host1:0,2@host2`."""
    exclude: str = ""
    """Use all but these hosts and slots of the hostfile."""
    master_addr: str | None = None
    """Host on which the processes meet; null takes the first."""
    master_port: int = Field(PORT, ge=1, le=65535)
    """Port on which the processes meet."""
    node_rank: NonNegativeInt | None = None
    """torchrun on several hosts: number of this host; 0 must be master_addr. Null lets torchrun tell by its name."""
    max_restarts: NonNegativeInt = 0
    """Times that a failed run is started again by itself, from its newest checkpoint."""
    launcher_args: str = ""
    """More arguments for torchrun, mpirun, pdsh or sbatch, as a shell would take them."""
    environment: dict[str, str] = {}
    """Variables that are set for every process."""
    slurm: dict[str, str | int | bool] = {}
    """Options of sbatch by their long name: {time: "04:00:00", partition: p}; true is a flag, false takes one away."""
    ssh_check: bool = True
    """Try each host over ssh before anything starts there."""

    @field_validator("launcher_args")
    @classmethod
    def check_quotes(cls, text: str) -> str:
        """A shell can take it apart."""
        try:
            shlex.split(text)
        except ValueError as error:
            raise ValueError(f"{text!r} is not what a shell takes: {error}") from None
        return text

    @field_validator("environment")
    @classmethod
    def check_names(cls, variables: dict[str, str]) -> dict[str, str]:
        """The names stand in scripts as they are."""
        if wrong := [
            name for name in variables if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
        ]:
            raise ValueError(
                f"{wrong[0]!r} is no name of a variable: letters, digits and _ make one"
            )
        return variables


class Plan(NamedTuple):
    """Which hosts run how many processes, and what each process runs."""

    config: LaunchConfig
    hosts: Hosts
    """Host -> slots; `localhost` is this machine, `(0)`, `(1)`, ... are hosts whose names are not known here."""
    command: list[str]
    """What one process runs, without the Python in front: `-m castalia train ...`."""
    output: Path
    """Folder of the run."""
    last_step: int
    """Step whose checkpoint means that the run is done."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return sum(len(slots) for slots in self.hosts.values())

    @property
    def named(self) -> bool:
        """Whether the names of the hosts are known here."""
        return "(0)" not in self.hosts

    @property
    def picked(self) -> bool:
        """Whether some host uses other slots than its first ones, so that it must be told which GPUs."""
        return any(slots != list(range(len(slots))) for slots in self.hosts.values())

    @property
    def per_node(self) -> int:
        """Processes on each host.

        Raises  ConfigError if the hosts differ, or other slots than the first are chosen.
        """
        if self.picked:
            raise ConfigError(
                f"the launcher {self.config.launcher} takes the first slots of a host; to choose others use pdsh"
            )
        counts = {host: len(slots) for host, slots in self.hosts.items()}
        if len(set(counts.values())) > 1:
            text = ", ".join(f"{host} {count}" for host, count in counts.items())
            raise ConfigError(
                f"{self.config.launcher} starts as many processes on each host, got {text}; use the launcher pdsh or"
                " mpi, or --procs-per-node"
            )
        return next(iter(counts.values()))

    @property
    def python(self) -> str:
        """The interpreter, the same path on every host."""
        return sys.executable

    @property
    def master(self) -> str:
        """Host on which the processes meet."""
        first = next(iter(self.hosts))
        return self.config.master_addr or ("127.0.0.1" if first == "localhost" else first)


def hosts_of(config: LaunchConfig, variables: Mapping[str, str] = os.environ) -> Hosts:
    """The hosts and slots that the config asks for.

    Raises  ConfigError for a bad hostfile, filter, or more hosts than there are.
    """
    file = config.hostfile or variables.get("DLTS_HOSTFILE")
    asked = config.procs_per_node or config.gpus_per_node
    if not file:
        if config.include or config.exclude:
            raise ConfigError(
                "include and exclude choose from a hostfile and there is none; name it with --hostfile"
            )
        if config.launcher == "pdsh":
            raise ConfigError(
                "the launcher pdsh needs a hostfile with lines `host slots=N`; name it with --hostfile"
            )
        count = config.nodes or 1
        if config.launcher == "mpi" and count > 1:
            raise ConfigError(
                f"mpirun needs the names of {count} hosts; name a file of `host slots=N` with --hostfile"
            )
        names = (
            ["localhost"]
            if count == 1 and config.launcher != "slurm"
            else [f"({n})" for n in range(count)]
        )
        return {name: list(range(asked or local_gpus() or 1)) for name in names}
    hosts = choose(read_hostfile(file), config.include, config.exclude)
    if config.nodes and config.nodes > len(hosts):
        raise ConfigError(
            f"nodes={config.nodes}, but {file} gives {len(hosts)}: {', '.join(hosts)}"
        )
    hosts = dict(list(hosts.items())[: config.nodes])
    short = [
        f"{host} has {len(slots)}" for host, slots in hosts.items() if asked and len(slots) < asked
    ]
    if short:
        raise ConfigError(f"{asked} processes a host asked, but {', '.join(short)} slots in {file}")
    return {host: slots[:asked] for host, slots in hosts.items()}


def local_gpus() -> int:
    """NVIDIA GPUs of this machine, counted without torch."""
    return (
        len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        if Path("/dev/nvidiactl").exists()
        else 0
    )


PASSED = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "TORCH_",
    "CASTALIA_",
    "HF_HOME",
)
"""Beginnings of the names of variables that go along to other hosts."""


def passed_variables(
    config: LaunchConfig, variables: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Variables for the processes on other hosts, those of the config last."""
    here = {name: value for name, value in sorted(variables.items()) if name.startswith(PASSED)}
    return here | config.environment
