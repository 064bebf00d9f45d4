"""The experts of a layer: tokens are sorted by expert, multiplied in segments, and put back.

Shapes: N tokens, K experts that each uses, R rows that are computed, one for each token of each
expert, E experts, C width, F width inside an expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.experts.local import local_part
from castalia.experts.products import grouped_product

Compute = Callable[[Tensor, Tensor], Tensor]
"""Outputs (R, C) of rows (R, C) that lie expert by expert, with counts (E,) int64."""


class Exchange(Protocol):
    """How rows come to the rank that holds their expert, and back."""

    def __call__(self, rows_RC: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        """compute(rows, counts) in the order of `rows`; counts are those of all experts of the
        model, and `compute` takes rows and counts of the experts held here. Differentiable."""


class WholeRows(Protocol):
    """How a rank that holds some tokens of each row sees the router outputs of all."""

    @property
    def size(self) -> int:
        """Ranks that share a row."""

    def gather(self, part_BTX: Tensor) -> Tensor:
        """All tokens of each row in their order, (B, T, X) -> (B, S, X); without a gradient."""

    def own(self, whole_BSX: Tensor) -> Tensor:
        """The tokens of this rank, (B, S, X) -> (B, T, X)."""


class SplitWidths(Protocol):
    """How ranks that each hold a part of every expert's width see the same tokens."""

    @property
    def size(self) -> int:
        """Ranks that split the widths."""

    def gather(self, part_BTX: Tensor) -> Tensor:
        """The tokens of all these ranks, (B, T, X) -> (B, S, X); differentiable."""

    def scatter(self, addend_BSX: Tensor) -> Tensor:
        """This rank's tokens of the sum over the ranks, (B, S, X) -> (B, T, X)."""


def all_here(rows_RC: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
    """The exchange of a rank that holds all experts."""
    return compute(rows_RC, counts_E)


class Route(NamedTuple):
    """Where each row comes from and goes to."""

    token: Tensor
    """Its token, int64 (R,)."""
    order: Tensor
    """Its place among the N * K assignments, int64 (R,)."""
    place: Tensor
    """The row of each assignment, int64 (N, K); R where there is none."""
    counts: Tensor
    """Rows of each expert, int64 (E,)."""
    whole: bool
    """Whether each assignment has a row."""


@torch.no_grad()
def route(chosen_NK: Tensor, kept_NK: Tensor | None, experts: int) -> Route:
    """Sort assignments by expert; the rows of one expert keep the order of their tokens."""
    expert = chosen_NK.flatten()
    if kept_NK is not None:
        # Behind all experts.
        expert = expert.masked_fill(~kept_NK.flatten(), experts)
    order = expert.argsort(stable=True)
    # Not bincount, which waits for the device to know its size.
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=expert.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    counts = counts[:experts]
    place = torch.empty_like(order)
    rows = len(order)
    place[order] = torch.arange(rows, device=order.device)
    if kept_NK is not None:
        rows = int(counts.sum())
        order = order[:rows]
        place = place.clamp(max=rows)
    return Route(
        token=order // chosen_NK.shape[1],
        order=order,
        place=place.view_as(chosen_NK),
        counts=counts,
        whole=kept_NK is None,
    )


class Take(torch.autograd.Function):
    """x[index], whose gradient adds up gradient[back] along its last dim: both are known, so that
    nothing is scattered in an order that differs from run to run.

    An index of the number of rows means a row of zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, whole: bool) -> Tensor:
        """Rows (n, C), index (m,), back (n, k) -> (m, C)."""
        ctx.save_for_backward(back)
        ctx.whole = whole
        return (x if whole else with_zeros(x))[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Of the rows."""
        (back,) = ctx.saved_tensors
        gradient = gradients[0] if ctx.whole else with_zeros(gradients[0])
        return gradient[back].sum(1), None, None, None


def with_zeros(x: Tensor) -> Tensor:
    """The rows, with one of zeros behind them."""
    return F.pad(x, (0, 0, 0, 1))


class Experts(nn.Module):
    """E MLPs of one shape, plain or with a gate, as stacks of matrices.

    `exchange`, `rows` and `widths` are set by castalia.distributed where ranks share experts, rows
    or the widths of experts; these ranks then split parameters along SPLIT_DIMS.
    """

    SPLIT_DIMS = {"gate": 1, "up": 1, "down": 2, "gate_bias": 1, "up_bias": 1}
    """The dim F of each parameter that has one."""

    def __init__(
        self,
        count: int,
        width: int,
        inner: int,
        function: Callable[[Tensor], Tensor],
        *,
        gated: bool,
        bias: bool,
        split_over_tp: bool = False,
    ) -> None:
        """`function` is the activation, of the gate where there is one; `split_over_tp` lets the
        ranks of tensor parallelism split the widths."""
        super().__init__()
        self.count = count
        self.function = function
        self.gated = gated
        self.exchange: Exchange = all_here
        self.rows: WholeRows | None = None
        self.split_over_tp = split_over_tp
        self.widths: SplitWidths | None = None
        if gated:
            self.gate = nn.Parameter(torch.empty(count, inner, width))
        self.up = nn.Parameter(torch.empty(count, inner, width))
        self.down = nn.Parameter(torch.empty(count, width, inner))
        for name, size in (("gate_bias", inner), ("up_bias", inner), ("down_bias", width)):
            present = bias and (gated or name != "gate_bias")
            values = nn.Parameter(torch.empty(count, size)) if present else None
            self.register_parameter(name, values)

    def forward(
        self, x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor, kept_NK: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the outputs of each token's experts.

        Shapes  (N, C), (N, K) int64, (N, K) float32, (N, K) bool or None -> (N, C), in the dtype
                of the products.
        """
        way = route(chosen_NK, kept_NK, self.count)
        x_NC = x_NC.to(product_dtype(x_NC))
        rows_RC = Take.apply(x_NC, way.token, way.place, way.whole)
        out_RC = self.exchange(rows_RC, way.counts, self.compute)
        back = way.order[:, None]
        out = Take.apply(out_RC, way.place.flatten(), back, way.whole)
        out_NKC = out.view(*chosen_NK.shape, out.shape[1])
        # In fp32, as DeepSpeed adds them up.
        return (out_NKC * weights_NK[..., None]).sum(1).to(out_RC.dtype)

    def compute(self, rows_RC: Tensor, counts_E: Tensor) -> Tensor:
        """The MLPs of the experts held here on their rows, (R, C) -> (R, C)."""
        up_RF = self.product(rows_RC, "up", counts_E)
        if self.gated:
            inner_RF = self.function(self.product(rows_RC, "gate", counts_E)) * up_RF
        else:
            inner_RF = self.function(up_RF)
        return self.product(inner_RF, "down", counts_E)

    def product(self, rows: Tensor, name: str, counts_E: Tensor) -> Tensor:
        """One matrix of each expert, and its bias."""
        weight = local_part(getattr(self, name))
        bias = getattr(self, f"{name}_bias")
        out = grouped_product(rows, weight.to(rows.dtype), counts_E)
        if bias is None:
            return out
        expert = torch.repeat_interleave(counts_E, output_size=len(rows))
        # A product, whose gradient adds up in the same order in every run.
        spread = F.one_hot(expert, len(counts_E)).to(rows.dtype)
        added = spread @ local_part(bias).to(rows.dtype)
        if self.widths is not None and name == "down":
            # Every rank adds its share, so that the sum over the ranks has it once.
            added = added / self.widths.size
        return out + added


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives products, which it does not know of segments."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
