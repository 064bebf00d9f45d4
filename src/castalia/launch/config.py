"""The config section `launch`: which launcher starts the run, on which hosts. Needs no torch."""

import re
import shlex
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from castalia.config.base import Config
from castalia.core.ranks import PORT
from castalia.launch.hostfile import host_name

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class LaunchConfig(Config):
    """How `castalia launch` starts the ranks. Training itself reads none of these fields."""

    launcher: Literal["torchrun", "slurm", "mpi", "pdsh"] = "torchrun"
    """torchrun starts the ranks of this machine, slurm submits a job, mpi calls mpirun, pdsh
    reaches hosts over ssh."""
    nodes: PositiveInt | None = None
    """Number of hosts; null means all hosts of the hostfile, or one."""
    procs_per_node: PositiveInt | None = None
    """Ranks on each host; null means gpus_per_node, else the hostfile's slots, else this machine's
    GPUs."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each host, one rank each; also requested from Slurm."""
    hostfile: str | None = None
    """File with lines `host slots=N`, or of Open MPI, MPICH or PBS; null means the file named by
    the environment variable DLTS_HOSTFILE, if set."""
    include: str = ""
    """Use only these hosts and slots of the hostfile: `host1:0,2@host2`; without a hostfile, these
    GPUs of this machine: `localhost:4,5`."""
    exclude: str = ""
    """Use all hosts and slots except these."""
    master_addr: str | None = None
    """Host of the rendezvous; null means the first host."""
    master_port: int = Field(PORT, ge=1, le=65535)
    """Port of the rendezvous."""
    node_rank: NonNegativeInt | None = None
    """Number of this host, for torchrun on several hosts; host 0 must be master_addr. With null,
    torchrun recognizes the rendezvous host by its name."""
    max_restarts: NonNegativeInt = 0
    """Number of times a failed run restarts by itself, from its newest checkpoint."""
    launcher_args: str = ""
    """Further arguments for torchrun, mpirun, pdsh or sbatch, quoted as in a shell."""
    environment: dict[str, str] = {}
    """Environment variables set for every rank."""
    slurm: dict[str, str | int | bool] = {}
    """Options of sbatch by their long names: {time: "04:00:00", partition: p}; true sets a flag,
    false removes one."""
    ssh_check: bool = True
    """Test the ssh connection to every host before starting anything."""

    @field_validator("master_addr")
    @classmethod
    def check_host(cls, host: str | None) -> str | None:
        """It is the name or the address of a host, which a launcher may be given as a word."""
        # An IPv6 address may name the interface that it is valid on.
        if host is not None and host_name(host.partition("%")[0]) is None:
            raise ValueError(f"{host!r} is neither the name nor the address of a host")
        return host

    @field_validator("launcher_args")
    @classmethod
    def check_quotes(cls, text: str) -> str:
        """Quotes are balanced."""
        try:
            shlex.split(text)
        except ValueError as error:
            raise ValueError(f"{text!r} is not valid shell syntax: {error}") from None
        return text

    @field_validator("environment")
    @classmethod
    def check_names(cls, variables: dict[str, str]) -> dict[str, str]:
        """Every name is safe in a script, where it is written without quotes."""
        for name in variables:
            if not VARIABLE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a variable name; use letters, digits and _, not starting with"
                    " a digit"
                )
        return variables
