"""Expert parallelism: the ranks of the ep axis hold different experts, and tokens travel to them.

Each rank sorts its tokens by expert, sends each rank those of its experts, and gets as many back.
How many tokens go where is known on each rank for its own alone, so counts travel first.

Source  Lepikhin et al. 2020, arXiv:2006.16668 (the dispatch); Singh et al. 2023, arXiv:2303.06318
        (experts split over tp as well).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from castalia.distributed.context_parallel import SequencePart
from castalia.distributed.gather import gather, sum_and_scatter
from castalia.distributed.world import World
from castalia.experts.layer import Compute, Experts, Take

SEQUENCE = 1
"""The dim T of (B, T, ...)."""


@dataclass(frozen=True)
class TokenExchange:
    """The ranks of `group`, each of which holds an equal part of the experts, in order.

    An `Exchange` of castalia.experts.layer.
    """

    group: dist.ProcessGroup

    def __call__(self, rows_RC: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        """Outputs of the experts for rows that lie expert by expert, in the same order.

        Every rank of the group makes the same collectives, also one that has no row or whose
        experts get none, and makes them again where a block is recomputed.
        """
        ranks = self.group.size()
        sent = counts_E.view(ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        # The one wait for the device: the collective needs its sizes on the host.
        there, here = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        arrived = travel(rows_RC, there, here, self.group)
        order = order_of_experts(received, sum(here))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        out = compute(Take.apply(arrived, order, back[:, None], True), received.sum(0))
        return travel(Take.apply(out, back, order[:, None], True), here, there, self.group)


def order_of_experts(received: Tensor, rows: int) -> Tensor:
    """Sorts the rows that came by expert: each rank's come expert by expert, one rank after the
    other.

    Shapes  (ranks, E) int64, rows from each rank for each expert held here -> (rows,) int64.
    """
    ranks, experts = received.shape
    numbers = torch.arange(experts, device=received.device).repeat(ranks)
    return numbers.repeat_interleave(received.flatten(), output_size=rows).argsort(stable=True)


def travel(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of the first dim in parts of these sizes; its backward goes the other way."""
    out: Tensor = AllToAll.apply(x, sent, received, group)
    return out


class AllToAll(torch.autograd.Function):
    """All-to-all with unequal parts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """The parts that came, in the order of the ranks."""
        ctx.sizes = (received, sent)
        ctx.group = group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradients of the parts that left."""
        sent, received = ctx.sizes
        return travel(d_out, sent, received, ctx.group), None, None, None


@dataclass(frozen=True)
class RowTokens:
    """Values by token of whole rows, out of those of the ranks that hold the row's tokens.

    A `WholeRows` of castalia.experts.layer.

    sequence  the chunks of each row that the ranks of cp hold; None where each holds whole rows.
    group     the ranks of tp, each with an equal part of those chunks' tokens; None where each has
              all of them.
    """

    sequence: SequencePart | None
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Ranks that share a row."""
        chunks = 1 if self.sequence is None else self.sequence.count
        return chunks if self.group is None else chunks * self.group.size()

    def gather(self, part_BTX: Tensor) -> Tensor:
        """All tokens of each row in their order, (B, T, X) -> (B, S, X); without a gradient."""
        out = part_BTX.detach()
        if self.group is not None:
            out = gather(out, SEQUENCE, self.group)
        if self.sequence is not None:
            out = self.sequence.gather(out, SEQUENCE)
        return out

    def own(self, whole_BSX: Tensor) -> Tensor:
        """The tokens of this rank, (B, S, X) -> (B, T, X)."""
        out = whole_BSX
        if self.sequence is not None:
            out = self.sequence.own(out)
        if self.group is not None:
            out = out.chunk(self.group.size(), SEQUENCE)[self.group.rank()]
        return out


@dataclass(frozen=True)
class WidthShare:
    """Experts whose widths the ranks of `group` split: each computes its part of all tokens.

    A `SplitWidths` of castalia.experts.layer.
    """

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        """Ranks that see the same tokens."""
        return self.group.size()

    def gather(self, part_BTC: Tensor) -> Tensor:
        """The tokens of all ranks, (B, T, C) -> (B, T * size, C); differentiable."""
        return gather(part_BTC, SEQUENCE, self.group)

    def scatter(self, addend_BSC: Tensor) -> Tensor:
        """This rank's tokens of the sum over the ranks, (B, T * size, C) -> (B, T, C)."""
        return sum_and_scatter(addend_BSC, SEQUENCE, self.group)


def share_experts(model: nn.Module, world: World) -> None:
    """Split the experts of every layer over ep, and over tp as the config says.

    This comes before tensor parallelism, which refuses parameters that are split by no plan.
    """
    for layer in model.modules():
        if isinstance(layer, Experts):
            share_layer(layer, world)


def share_layer(experts: Experts, world: World) -> None:
    """One layer: its parameters become DTensors where ranks split them or hold copies of them."""
    degrees = world.degrees
    assert world.mesh is not None
    tp = world.mesh["tp"].get_group() if degrees.tp > 1 else None
    if tp is not None and experts.split_over_tp:
        experts.widths = WidthShare(tp)
        tp = None
    if world.sequence is not None or tp is not None:
        experts.rows = RowTokens(world.sequence, tp)
    axes = {"ep": degrees.ep, "tp": degrees.tp}
    names = tuple(axis for axis, degree in axes.items() if degree > 1)
    if not names:
        return
    mesh = world.mesh if world.experts is None else world.experts
    if degrees.ep > 1:
        experts.exchange = TokenExchange(mesh["ep"].get_group())
    for name, parameter in list(experts.named_parameters()):
        placements: dict[str, Placement] = {"ep": Shard(0), "tp": Replicate()}
        dim = experts.SPLIT_DIMS.get(name)
        if experts.split_over_tp and dim is not None:
            placements["tp"] = Shard(dim)
        # src_data_rank=None: the values come later, there is nothing to broadcast.
        split = distribute_tensor(
            parameter, mesh[names], [placements[axis] for axis in names], src_data_rank=None
        )
        experts.register_parameter(name, nn.Parameter(split, parameter.requires_grad))


def shard_dim(shards: int, parameter: Tensor) -> int:
    """The dim along which FSDP2 cuts an expert's parameter over `shards` ranks.

    Whole experts if they are divisible, else the width of each: with fewer experts than ranks, some
    ranks would hold none and others all.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    # torch 2.13 cuts equal parts only along other dims than the first.
    return int(local.shape[0] % shards > 0 and local.shape[1] % shards == 0)
