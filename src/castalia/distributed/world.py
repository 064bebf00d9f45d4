"""The processes of a run, as a launcher starts them; one process needs no launcher."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from castalia.core.errors import ConfigError
from castalia.core.ranks import environment
from castalia.distributed.config import Degrees, ParallelConfig
from castalia.distributed.context_parallel import SequencePart
from castalia.distributed.join import join


def check_layout(config: ParallelConfig, size: int) -> None:
    """Refuse a layout that does not make `size` processes, before any process group starts.

    Raises  ConfigError.
    """
    if config.degrees(size).size == size:
        return
    product = " x ".join(
        f"parallel.{axis}={getattr(config, axis) or 'all that are left'}"
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        if getattr(config, axis) != 1
    )
    wanted = config.degrees(1)._replace(dp_shard=config.dp_shard or 1).size
    multiple = "" if config.dp_shard else " or a multiple of it"
    raise ConfigError(
        f"{product} does not make {size} process{'es' if size > 1 else ''}; start {wanted}{multiple} with"
        " torchrun --nproc-per-node, or change the degrees"
    )


ALONE = Degrees(1, 1, 1, 1, 1)
"""One process."""


@dataclass(frozen=True)
class World:
    """This process among all of them.

    `mesh` has the axes along which weights are split: pp, dp_replicate, dp_shard (cp is folded into it: the processes
    that split a sequence share its weights too) and tp; None for one process alone.
    `parts` is the group of the processes that hold different parts of a batch's loss: all of one tp coordinate.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    degrees: Degrees = ALONE
    cp_group: dist.ProcessGroup | None = None
    parts: dist.ProcessGroup | None = None

    @classmethod
    def start(cls, config: ParallelConfig, device: str = "auto") -> "World":
        """Join the other processes (gloo on CPU, nccl on GPU); alone, no process group is made."""
        rank, size, local_rank = environment()
        check_layout(config, size)
        kind = (
            "cuda"
            if device == "cuda" or (device == "auto" and torch.cuda.is_available())
            else "cpu"
        )
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "device=cuda, but torch finds no GPU here; use device=auto or device=cpu"
            )
        place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(place)
        if size == 1:
            return cls(0, 1, place)
        if not dist.is_initialized():
            join("nccl" if kind == "cuda" else "gloo", rank, size, config.timeout)
        return cls(rank, size, place, *meshes(kind, config.degrees(size)))

    def coordinate(self, axis: str) -> int:
        """This process's place along pp, dp_replicate, dp_shard, cp or tp."""
        stride = 1
        for name, degree in reversed(self.degrees._asdict().items()):
            if name == axis:
                return self.rank // stride % degree
            stride *= degree
        raise KeyError(axis)

    @property
    def dp_rank(self) -> int:
        """Which rows of a batch this process takes, of `degrees.dp`."""
        return self.coordinate("dp_replicate") * self.degrees.dp_shard + self.coordinate("dp_shard")

    @property
    def sequence(self) -> SequencePart | None:
        """The tokens of each row that this process takes; None when it takes whole rows."""
        if self.cp_group is None:
            return None
        return SequencePart(self.coordinate("cp"), self.degrees.cp, self.cp_group)

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and folders."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the processes that hold different parts of a batch, in place and returned."""
        if self.size > 1:
            dist.all_reduce(values, group=self.parts)
        return values

    def agree(self, number: int) -> int:
        """The number that rank 0 holds."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def union(self, numbers: Iterable[int]) -> list[int]:
        """What any process holds of these numbers from 0 on, each once, in ascending order."""
        mine = sorted(set(numbers))
        if self.size == 1:
            return mine
        (most,) = self.largest(len(mine))
        padded = torch.tensor(
            [*mine, *[-1] * (most - len(mine))], dtype=torch.int64, device=self.device
        )
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return sorted({number for part in parts for number in part.tolist() if number >= 0})

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def meshes(
    kind: str, degrees: Degrees
) -> tuple[DeviceMesh, Degrees, dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The mesh of the weights, the degrees, and the groups `cp_group` and `parts`; all processes call it together."""
    pp, dp_replicate, dp_shard, cp, tp = degrees
    mesh = init_device_mesh(
        kind,
        (pp, dp_replicate, dp_shard * cp, tp),
        mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"),
    )
    cp_group = parts = None
    if cp > 1:
        shape = (pp * degrees.dp, cp, tp)
        cp_group = init_device_mesh(kind, shape, mesh_dim_names=("rows", "cp", "tp"))[
            "cp"
        ].get_group()
    if tp > 1:
        parts = init_device_mesh(kind, (degrees.size // tp, tp), mesh_dim_names=("parts", "tp"))[
            "parts"
        ].get_group()
    return mesh, degrees, cp_group, parts
