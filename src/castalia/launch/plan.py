"""A launch plan: which hosts run how many ranks, and with which command. Needs no torch."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from castalia.core.errors import ConfigError
from castalia.core.secrets import without_secrets
from castalia.core.starter import STARTER
from castalia.launch.config import VARIABLE_NAME, LaunchConfig
from castalia.launch.hostfile import Hosts, address, choose, read_hostfile

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
    def variables(self) -> dict[str, str]:
        """Environment variables of the ranks that start on this machine.

        A single host whose first slots are not all in use is told its GPUs in this way.
        """
        if not self.selects_slots or len(self.hosts) > 1:
            return self.config.environment
        (slots,) = self.hosts.values()
        visible = visible_gpus(os.environ) or []
        # Slots count within the GPUs that are visible already, as local_gpus counted them.
        names = [visible[slot] if slot < len(visible) else str(slot) for slot in slots]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names)} | self.config.environment

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
        """Check that each host uses its first slots; only pdsh can assign others to several hosts.

        Raises  ConfigError if not.
        """
        starts_here = self.config.launcher == "torchrun" or self.is_local
        if self.selects_slots and not (starts_here and len(self.hosts) == 1):
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
            return self.config.master_addr.strip("[]")
        return "127.0.0.1" if first == LOCAL else address(first)


def names_hosts(config: LaunchConfig, variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the hosts of a launch are listed somewhere, or are several without names."""
    return bool(config.hostfile or variables.get("DLTS_HOSTFILE") or (config.nodes or 1) > 1)


def hosts_for(config: LaunchConfig, variables: Mapping[str, str] = os.environ) -> Hosts:
    """Hosts and slots of a launch.

    Raises  ConfigError if the hostfile or a filter is wrong, or asks for more than the hosts have.
    """
    path = config.hostfile or variables.get("DLTS_HOSTFILE")
    wanted = config.procs_per_node or config.gpus_per_node
    source = path or "this machine"
    if path:
        hosts = read_hostfile(path, bare_slots=wanted or 1)
    elif config.include or config.exclude:
        hosts = this_machine(config)
    else:
        return hosts_without_file(config)
    hosts = choose(hosts, config.include, config.exclude)
    if config.nodes and config.nodes > len(hosts):
        raise ConfigError(
            f"nodes={config.nodes}, but {source} has {len(hosts)} hosts: {', '.join(hosts)};"
            " lower --nodes or add hosts"
        )
    hosts = dict(list(hosts.items())[: config.nodes])
    if not wanted:
        return hosts
    too_few = [f"{host} has {len(slots)}" for host, slots in hosts.items() if len(slots) < wanted]
    if too_few:
        raise ConfigError(
            f"{wanted} ranks per host need as many slots, but in {source} {', '.join(too_few)};"
            " lower --procs-per-node or --gpus-per-node, or exclude these hosts"
        )
    return {host: slots[:wanted] for host, slots in hosts.items()}


def this_machine(config: LaunchConfig) -> Hosts:
    """This machine and its slots, from which a filter without a hostfile selects.

    Source  DeepSpeed, the same file: without a hostfile `include: localhost:0` names GPUs of this
            machine.
    Raises  ConfigError if the filter names another host, or the launcher starts ranks elsewhere.
    """
    text = config.include or config.exclude
    names = {part.partition(":")[0].strip() for part in text.split("@")}
    if names != {LOCAL} or config.launcher in ("slurm", "pdsh"):
        raise ConfigError(
            "include and exclude select hosts of a hostfile, but none is given; add --hostfile"
        )
    # Without a GPU a slot is a rank on the CPU, of which there are as many as the filter names.
    named = [int(slot) for slot in re.findall(r"\d+", text)]
    return {LOCAL: list(range(local_gpus() or max(named, default=0) + 1))}


def hosts_without_file(config: LaunchConfig) -> Hosts:
    """This machine, or `nodes` hosts without names.

    Raises  ConfigError if the launcher needs a hostfile, or this machine lacks the GPUs.
    """
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
        require_gpus(config)
        return {LOCAL: list(range(ranks))}
    return {UNNAMED.format(number): list(range(ranks)) for number in range(count)}


def require_gpus(config: LaunchConfig) -> None:
    """Check that this machine has the GPUs that gpus_per_node asks of each host.

    Raises  ConfigError if not.
    """
    wanted = config.gpus_per_node or 0
    here = local_gpus()
    if wanted > here:
        # The driver's files do not list every kind of GPU, so torch has the last word.
        import torch

        here = torch.cuda.device_count()
    if wanted > here:
        has = {0: "no GPU", 1: "one GPU"}.get(here, f"{here} GPUs")
        raise ConfigError(
            f"gpus_per_node={wanted}, but this machine has {has}; lower --gpus-per-node, or start"
            f" ranks on the CPU with --procs-per-node {wanted}"
        )


def local_gpus(variables: Mapping[str, str] = os.environ) -> int:
    """Number of NVIDIA GPUs of this machine that a process may use, counted without torch."""
    # The driver may list GPUs in /proc that a container cannot open; then the device node is
    # missing.
    if not Path("/dev/nvidiactl").exists():
        return 0
    visible = visible_gpus(variables)
    if visible is not None:
        return len(visible)
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def visible_gpus(variables: Mapping[str, str]) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; None if it is not set, and all are visible."""
    text = variables.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    # -1 is no GPU: it hides them all.
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "-1")]


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
    """Environment variables for ranks on other hosts, without credentials. Those of the config take
    precedence."""
    forwarded = {}
    for name, value in sorted(without_secrets(variables).items()):
        # Names stand in scripts without quotes; the starter is a process of this host.
        if name.startswith(PASSED) and VARIABLE_NAME.fullmatch(name) and name != STARTER:
            forwarded[name] = value
    return forwarded | config.environment
