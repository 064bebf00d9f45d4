"""A launch plan: which hosts run how many ranks, and with which command. Needs no torch."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from castalia.core.errors import ConfigError
from castalia.launch.config import LaunchConfig
from castalia.launch.hostfile import Hosts, choose, read_hostfile

LOCAL = "localhost"
UNNAMED = "({})"
"""Placeholders `(0)`, `(1)`, … for hosts whose names only the scheduler, or each host itself,
knows."""


class LaunchPlan(NamedTuple):
    """Which hosts run how many ranks, and the command of each rank."""

    config: LaunchConfig
    hosts: Hosts
    """Host -> slots. `localhost` is this machine; `(0)`, `(1)`, … are hosts without a known
    name."""
    command: list[str]
    """Arguments of the Python interpreter for one rank: `-m castalia train ...`."""
    output: Path
    """Folder of the run."""
    last_step: int
    """The step whose checkpoint means that the run is complete."""

    @property
    def world_size(self) -> int:
        """Number of ranks on all hosts."""
        return sum(len(slots) for slots in self.hosts.values())

    @property
    def is_local(self) -> bool:
        """Whether all ranks run on this machine."""
        return list(self.hosts) == [LOCAL]

    @property
    def hosts_are_named(self) -> bool:
        """Whether the names of the hosts are known here."""
        return UNNAMED.format(0) not in self.hosts

    @property
    def selects_slots(self) -> bool:
        """Whether a host skips some of its first slots, so that its ranks need GPU numbers."""
        return any(slots != list(range(len(slots))) for slots in self.hosts.values())

    @property
    def is_uniform(self) -> bool:
        """Whether all hosts run the same number of ranks."""
        return len({len(slots) for slots in self.hosts.values()}) == 1

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each host, for launchers that take one number for all.

        Raises  ConfigError if the hosts differ, or do not use their first slots.
        """
        self.require_first_slots()
        if not self.is_uniform:
            counts = ", ".join(f"{host} {len(slots)}" for host, slots in self.hosts.items())
            raise ConfigError(
                f"{self.config.launcher} starts equally many ranks on each host, got {counts}; use"
                " --launcher pdsh or mpi, or set --procs-per-node"
            )
        return len(next(iter(self.hosts.values())))

    def require_first_slots(self) -> None:
        """Check that each host uses its first slots; only pdsh can assign others.

        Raises  ConfigError if not.
        """
        if self.selects_slots:
            raise ConfigError(
                f"launcher {self.config.launcher} always uses the first slots of a host; use"
                " --launcher pdsh to choose others"
            )

    @property
    def python(self) -> str:
        """Path of the interpreter, assumed to be the same on every host."""
        return sys.executable

    @property
    def master(self) -> str:
        """Host of the rendezvous."""
        first = next(iter(self.hosts))
        if self.config.master_addr:
            return self.config.master_addr
        return "127.0.0.1" if first == LOCAL else first


def hosts_for(config: LaunchConfig, variables: Mapping[str, str] = os.environ) -> Hosts:
    """Hosts and slots of a launch.

    Raises  ConfigError if the hostfile or a filter is wrong, or asks for more than the hosts have.
    """
    path = config.hostfile or variables.get("DLTS_HOSTFILE")
    if not path:
        return hosts_without_file(config)
    hosts = choose(read_hostfile(path), config.include, config.exclude)
    if config.nodes and config.nodes > len(hosts):
        raise ConfigError(
            f"nodes={config.nodes}, but {path} has {len(hosts)} hosts: {', '.join(hosts)};"
            " lower --nodes or add hosts"
        )
    hosts = dict(list(hosts.items())[: config.nodes])
    wanted = config.procs_per_node or config.gpus_per_node
    if not wanted:
        return hosts
    too_few = [f"{host} has {len(slots)}" for host, slots in hosts.items() if len(slots) < wanted]
    if too_few:
        raise ConfigError(
            f"{wanted} ranks per host need as many slots, but in {path} {', '.join(too_few)};"
            " lower --procs-per-node or --gpus-per-node, or exclude these hosts"
        )
    return {host: slots[:wanted] for host, slots in hosts.items()}


def hosts_without_file(config: LaunchConfig) -> Hosts:
    """This machine, or `nodes` hosts without names.

    Raises  ConfigError if the launcher or a filter needs a hostfile.
    """
    if config.include or config.exclude:
        raise ConfigError(
            "include and exclude select hosts of a hostfile, but none is given; add --hostfile"
        )
    if config.launcher == "pdsh":
        raise ConfigError(
            "launcher pdsh needs a hostfile with lines `host slots=N`; add --hostfile"
        )
    count = config.nodes or 1
    if config.launcher == "mpi" and count > 1:
        raise ConfigError(
            f"mpirun needs the names of the {count} hosts; list them as `host slots=N` in a file"
            " and add --hostfile"
        )
    ranks = config.procs_per_node or config.gpus_per_node or local_gpus() or 1
    # A Slurm job runs on a host that Slurm picks, even a job of one host.
    if count == 1 and config.launcher != "slurm":
        return {LOCAL: list(range(ranks))}
    return {UNNAMED.format(number): list(range(ranks)) for number in range(count)}


def local_gpus() -> int:
    """Number of NVIDIA GPUs of this machine, counted without torch."""
    # The driver may list GPUs in /proc that a container cannot open; then the device node is
    # missing.
    if not Path("/dev/nvidiactl").exists():
        return 0
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


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
"""Prefixes of the environment variables that are forwarded to other hosts."""


def passed_variables(
    config: LaunchConfig, variables: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Environment variables for ranks on other hosts. Those of the config take precedence."""
    forwarded = {}
    for name, value in sorted(variables.items()):
        if name.startswith(PASSED):
            forwarded[name] = value
    return forwarded | config.environment
