"""Losses of the routing, whose gradients enter where they arise.

A layer has no second output for them: the sum that it returns carries their gradient, so that they
survive recompute, compiled blocks and pipelines.
Shapes: B rows, T tokens held here, E experts, K experts that a token uses, G groups.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.experts.config import MoeConfig
from castalia.experts.decision import assignments
from castalia.experts.groups import Groups
from castalia.experts.ledger import Ledger


class Routing(NamedTuple):
    """How the tokens held here were routed."""

    logits: Tensor
    """Outputs of the router, (B, T, E) float32."""
    scores: Tensor
    """What the weights are made of, (B, T, E)."""
    chosen: Tensor
    """Experts of each token, int64 (B, T, K)."""
    kept: Tensor | None
    """Bool (B, T, K), False where an expert had no room; None where all had."""


class Book(NamedTuple):
    """Where a layer enters what it did."""

    ledger: Ledger
    layer: int
    copies: int
    """Ranks that see the same tokens, whose gradients are added up."""


class WithLoss(torch.autograd.Function):
    """The tensor as it is; its backward gives `loss` the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        """(...), () -> (...)."""
        ctx.scale = scale
        ctx.options = {"dtype": loss.dtype, "device": loss.device}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of the tensor and of the loss."""
        return gradients[0], torch.full((), ctx.scale, **ctx.options), None


def shares_of(config: MoeConfig, scores_BTE: Tensor) -> Tensor:
    """The scores of a token as shares with the sum 1, (B, T, E) -> (B, T, E)."""
    if config.scores == "softmax":
        return scores_BTE
    total = scores_BTE.sum(-1, keepdim=True)
    return scores_BTE / total.clamp(min=torch.finfo(total.dtype).eps)


def balance_loss(shares_BTE: Tensor, load_GE: Tensor, tokens: int) -> Tensor:
    """Sum over rows of the load-balancing loss, 1 for a row in balance.

    Shapes  shares (B, T, E) of the scores; load (B, E), or (1, E) for all rows together: the share
            of the assignments of a group that each expert got, drops included; scalar.
    Units   tokens, of a whole row: a rank that holds some of them returns its addend.
    Source  Fedus et al. 2021, arXiv:2101.03961, equation 4.
    """
    return (load_GE[:, None] * shares_BTE).sum() * (load_GE.shape[-1] / tokens)


def z_loss(logits_BTE: Tensor, tokens: int) -> Tensor:
    """Sum over rows of the mean squared log of the partition function; scalar.

    Units   tokens, of a whole row.
    Source  Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    return logits_BTE.logsumexp(-1).square().sum() / tokens


def with_losses(
    config: MoeConfig,
    out_BTC: Tensor,
    routing: Routing,
    load_GE: Tensor,
    groups: Groups,
    book: Book,
) -> Tensor:
    """The layer's output with the gradients of its losses, which are counted in the ledger."""
    if book.ledger.padding:
        return out_BTC
    with torch.autocast(out_BTC.device.type, enabled=False):
        shares_BTE = shares_of(config, routing.scores)
        balance = balance_loss(shares_BTE, load_GE, groups.tokens)
        z = z_loss(routing.logits, groups.tokens)
        loss = config.balance_loss * balance + config.z_loss * z
        if book.ledger.records:
            count(routing, shares_BTE, balance, z, groups, book)
        if not loss.requires_grad:
            # The router is frozen, and the layers before it are, too.
            return out_BTC
        out: Tensor = WithLoss.apply(out_BTC, loss, book.ledger.scale / book.copies)
        return out


@torch.no_grad()
def count(
    routing: Routing,
    shares_BTE: Tensor,
    balance: Tensor,
    z: Tensor,
    groups: Groups,
    book: Book,
) -> None:
    """Enter the tokens of a pass in the ledger."""
    B, T, E = shares_BTE.shape
    counts_E = assignments(routing.chosen.reshape(1, -1), E)[0]
    dropped = counts_E.new_zeros(())
    if routing.kept is not None:
        dropped = (~routing.kept).sum()
    entropy = torch.special.entr(shares_BTE).sum()
    # Filled there: a copy from the host would wait for the device. Of a row that ranks share each
    # has its part.
    tokens = entropy.new_full((), B * T)
    rows = entropy.new_full((), B / groups.shared)
    sums = torch.stack([tokens, rows, dropped, balance, z, entropy]).double()
    book.ledger.record(book.layer, counts_E, sums)
