"""The ranks of a run, as a launcher starts them; a single process needs no launcher."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from castalia.core.errors import ConfigError
from castalia.core.ranks import environment
from castalia.core.starter import end_with_starter
from castalia.distributed.config import AXES, Degrees, ParallelConfig
from castalia.distributed.context_parallel import SequencePart
from castalia.distributed.join import join, leave
from castalia.distributed.mesh import (
    LOSSES,
    SEQUENCES,
    WEIGHTS,
    coordinate,
    make_expert_mesh,
    make_mesh,
)
from castalia.monitor.parts import COLLECTIVES, part


def check_layout(config: ParallelConfig, size: int) -> None:
    """Refuse parallel degrees that do not multiply to the world size, before any process group
    starts.

    Raises  ConfigError.
    """
    degrees = config.degrees(size)
    if degrees.size == size:
        require_groups_of_experts(degrees)
        return
    # dp_shard=null is left out: it has no number of its own, it takes the ranks that the others
    # leave.
    given = {axis: getattr(config, axis) for axis in AXES}
    product = " x ".join(
        f"parallel.{axis}={degree}" for axis, degree in given.items() if degree not in (None, 1)
    )
    wanted = config.degrees(1)._replace(dp_shard=config.dp_shard or 1).size
    # Without a fixed dp_shard the sharded ranks fill up what the other degrees leave.
    multiple = "" if config.dp_shard else " or a multiple of it"
    raise ConfigError(
        f"{product} needs a world size of {wanted}{multiple}, got {size}:"
        f" start {wanted} ranks with torchrun --nproc-per-node, or change the degrees"
    )


def require_groups_of_experts(degrees: Degrees) -> None:
    """Raises  ConfigError if the ranks that hold different experts do not divide those among which
    they are taken."""
    if degrees.shards % degrees.ep == 0:
        return
    raise ConfigError(
        f"parallel.ep={degrees.ep} does not divide the {degrees.shards} ranks of"
        f" parallel.dp_shard={degrees.dp_shard} times parallel.cp={degrees.cp}: the ranks that"
        " split the experts are taken from these; choose a divisor of it, or more of these ranks"
    )


ALONE = Degrees(1, 1, 1, 1, 1)
"""The degrees of a single rank."""


@dataclass(frozen=True)
class World:
    """This rank among all of them.

    mesh      how weights are split and copied, see `castalia.distributed.mesh`; None for a single
              rank.
    experts   the same of the weights of experts; None where it is `mesh`.
    cp_group  the ranks that hold tokens of the same rows; None where each holds whole rows.
    parts     the ranks that hold different addends of a batch's loss; None means all of them.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    degrees: Degrees = ALONE
    cp_group: dist.ProcessGroup | None = None
    parts: dist.ProcessGroup | None = None
    experts: DeviceMesh | None = None

    @classmethod
    def start(cls, config: ParallelConfig, device: str = "auto") -> "World":
        """Join the other ranks, by gloo on CPUs and nccl on GPUs; a single rank makes no process
        group.

        Raises  ConfigError for degrees that do not fit the world size, or device=cuda without a
                GPU.
        """
        rank, size, local_rank = environment()
        check_layout(config, size)
        place = choose_device(device, local_rank)
        if size == 1:
            return cls(0, 1, place)
        # Also in a script of a user's, which torchrun started without our command.
        end_with_starter()
        if not dist.is_initialized():
            join("nccl" if place.type == "cuda" else "gloo", rank, size, config.timeout)
        return cls.arranged(rank, place, config.degrees(size), place.type)

    @classmethod
    def arranged(
        cls, rank: int, device: torch.device, degrees: Degrees, mesh_device: str
    ) -> "World":
        """The ranks of an existing process group, arranged by `degrees`; all ranks call it
        together.

        `mesh_device` is `cpu` or `cuda`, the kind of device that the process group's backend
        serves.
        """
        # Making a mesh is a collective call, so every rank makes the same ones in the same order.
        # Those whose extra axis has one rank are left out: each process group costs memory and
        # connections.
        mesh = make_mesh(mesh_device, degrees, WEIGHTS)
        cp_group = parts = experts = None
        if degrees.ep > 1:
            experts = make_expert_mesh(mesh, degrees)
        if degrees.cp > 1:
            cp_group = make_mesh(mesh_device, degrees, SEQUENCES)["cp"].get_group()
        if degrees.tp > 1:
            parts = make_mesh(mesh_device, degrees, LOSSES)["parts"].get_group()
        return cls(rank, degrees.size, device, mesh, degrees, cp_group, parts, experts)

    def coordinate(self, axis: str) -> int:
        """This rank's coordinate along pp, dp_replicate, dp_shard, cp or tp."""
        return coordinate(self.rank, self.degrees, axis)

    @property
    def dp_rank(self) -> int:
        """Which share of a batch's rows this rank takes, of `degrees.dp`."""
        return self.coordinate("dp_replicate") * self.degrees.dp_shard + self.coordinate("dp_shard")

    @property
    def share_of_rows(self) -> tuple[int, int]:
        """Which part this rank takes of work on the rows that it has in common with others, and
        how many parts there are."""
        degrees = self.degrees
        part = self.coordinate("pp") * degrees.cp + self.coordinate("cp")
        return part * degrees.tp + self.coordinate("tp"), degrees.pp * degrees.cp * degrees.tp

    @property
    def sequence(self) -> SequencePart | None:
        """The tokens of each row that this rank holds; None where it holds whole rows."""
        if self.cp_group is None:
            return None
        return SequencePart(self.coordinate("cp"), self.degrees.cp, self.cp_group)

    @property
    def leads(self) -> bool:
        """Whether this rank writes logs and folders."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks with different addends of the loss, in place and
        returned."""
        if self.size > 1:
            with part(COLLECTIVES):
                dist.all_reduce(values, group=self.parts)
        return values

    def agree(self, number: int) -> int:
        """The number that rank 0 passes."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        with part(COLLECTIVES):
            dist.broadcast(shared, src=0)
        return int(shared)

    def largest(self, *numbers: int) -> list[int]:
        """The largest value of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        with part(COLLECTIVES):
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def smallest(self, number: int) -> int:
        """The smallest value of a number over all ranks."""
        return -self.largest(-number)[0]

    def union(self, numbers: Iterable[int]) -> list[int]:
        """The set of non-negative numbers that any rank passes, in ascending order."""
        mine = sorted(set(numbers))
        if self.size == 1:
            return mine
        # all_gather needs equal lengths: shorter lists are padded with -1, which is dropped again.
        (most,) = self.largest(len(mine))
        padding = [-1] * (most - len(mine))
        padded = torch.tensor([*mine, *padding], dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with part(COLLECTIVES):
            dist.all_gather(gathered, padded)
        return sorted({number for each in gathered for number in each.tolist() if number >= 0})

    def wait(self) -> None:
        """Return when every rank has called this."""
        if self.size > 1:
            with part(COLLECTIVES):
                dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            leave()


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of this rank: `cuda` takes the GPU of its local rank, `auto` a GPU where one is
    found.

    Raises  ConfigError if `cuda` is asked for and torch finds no GPU.
    """
    found_gpu = torch.cuda.is_available()
    if name == "cuda" and not found_gpu:
        raise ConfigError("device=cuda, but torch finds no GPU; use device=auto or device=cpu")
    if name == "cpu" or not found_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
