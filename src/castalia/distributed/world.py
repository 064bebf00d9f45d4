"""The processes of a run, as torchrun starts them; one process needs no launcher."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from castalia.core.errors import ConfigError
from castalia.distributed.config import ParallelConfig


def environment() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this host) out of torchrun's variables; (0, 1, 0) without a launcher."""
    return tuple(int(os.environ.get(name, default)) for name, default in VARIABLES)  # type: ignore[return-value]


VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def check_layout(config: ParallelConfig, size: int) -> None:
    """Refuse a layout that cannot run on `size` processes, before any process group starts.

    Raises  ConfigError listing every reason.
    """
    problems = [
        f"parallel.{axis}={getattr(config, axis)} is not supported yet; only data parallelism (dp_shard, dp_replicate)"
        f" is: set parallel.{axis}=1"
        for axis in ("tp", "pp", "cp")
        if getattr(config, axis) != 1
    ]
    wanted = config.dp_replicate * (config.dp_shard or 1)
    if size % config.dp_replicate or (config.dp_shard and wanted != size):
        shard = config.dp_shard or "all that are left"
        problems.append(
            f"parallel.dp_replicate={config.dp_replicate} x parallel.dp_shard={shard} does not make {size} processes;"
            f" start {wanted} with torchrun --nproc-per-node, or change the degrees"
        )
    if problems:
        raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @classmethod
    def start(cls, config: ParallelConfig, device: str = "auto") -> "World":
        """Join the other processes (gloo on CPU, nccl on GPU); alone, no process group is made."""
        rank, size, local_rank = environment()
        check_layout(config, size)
        kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch finds no GPU here; use device=auto or device=cpu")
        place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(place)
        if size == 1:
            return cls(0, 1, place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=size)
        shape = (config.dp_replicate, size // config.dp_replicate)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        return cls(rank, size, place, mesh)

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and folders."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes, in place and returned."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, number: int) -> int:
        """The number that rank 0 holds."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
