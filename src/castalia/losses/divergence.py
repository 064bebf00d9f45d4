"""Divergence of a model from a reference over the whole vocabulary, without whole logits matrices.

For the logits x of the model and y of the reference, of each row,

    KL(q || p) = sum_j q_j (log q_j - log p_j),   p = softmax x, q = softmax y
    d KL / dx  = p - q

Logits exist for a chunk of rows at a time, as in `castalia.losses.cross_entropy`, whose way with a
vocabulary that is split over ranks this follows. The reference gets no gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from castalia.losses.cross_entropy import add_product, chunk_slices, compute_dtype
from castalia.models.context import VocabShare
from castalia.models.tiles import logits_rows


class Head(NamedTuple):
    """Hidden states (N, C), and the weight (V, C) that makes logits of them."""

    hidden: Tensor
    weight: Tensor


class Plan(NamedTuple):
    """What stays the same for all chunks of a call."""

    dtype: torch.dtype
    chunks: list[slice]
    part: VocabShare | None


def divergence(
    model: Head, reference: Head, weights: Tensor, part: VocabShare | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum over the rows of KL(reference || model), and each row's KL.

    Shapes  weights (N,) float32, constants in the backward pass -> float32 scalar with a gradient
            of the model's hidden states and weight; (N,) float32 without one.
    Units   nats.

    part    the weights are this rank's part of the head; as in `fused_cross_entropy` the results
            are those of the whole vocabulary, and the gradient of hidden is this rank's addend.
    """
    if part is not None:
        model = model._replace(weight=part.local(model.weight))
        reference = reference._replace(weight=part.local(reference.weight))
    V, C = model.weight.shape
    dtype = compute_dtype(*model)
    rows = logits_rows(V, C, dtype.itemsize, model.weight.device.type)
    plan = Plan(dtype, chunk_slices(len(model.hidden), rows), part)
    fixed = Head(*(tensor.detach() for tensor in reference))
    apply: Callable[..., tuple[Tensor, Tensor]] = Divergence.apply
    # The dtype is chosen above; autocast must not convert again inside.
    with torch.autocast(model.hidden.device.type, enabled=False):
        return apply(*model, *fixed, weights.float(), plan)


class Divergence(torch.autograd.Function):
    """Divergences and gradients of all chunks in the forward pass; the backward pass scales
    them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        other_hidden: Tensor,
        other_weight: Tensor,
        weights: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        """Total and divergences of the rows; the gradients wait in `ctx`."""
        wide = weight.to(plan.dtype)
        other_wide = other_weight.to(plan.dtype)
        rows = hidden.new_empty(len(hidden), dtype=torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        d_weight = None
        if wants_weight:
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for at in plan.chunks:
            h = hidden[at].to(plan.dtype)
            log_p = log_softmax(h @ wide.T, plan.part)
            log_q = log_softmax(other_hidden[at].to(plan.dtype) @ other_wide.T, plan.part)
            q = log_q.exp()
            own = (q * (log_q - log_p)).sum(1)
            rows[at] = own if plan.part is None else plan.part.sum(own)
            gradient = ((log_p.exp() - q) * weights[at, None]).to(plan.dtype)
            if d_hidden is not None:
                d_hidden[at] = (gradient @ wide).to(d_hidden.dtype)
            if d_weight is not None:
                add_product(d_weight, gradient, h)
        ctx.gradients = (d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(rows)
        return (rows * weights).sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and release them."""
        d_hidden, d_weight = (None if d is None else d.mul_(d_total) for d in ctx.gradients)
        ctx.gradients = None
        return d_hidden, d_weight, None, None, None, None


def log_softmax(logits: Tensor, part: VocabShare | None) -> Tensor:
    """Log-probabilities (R, V) float32 of this rank's tokens, over the whole vocabulary."""
    logits = logits.float()
    if part is None:
        return logits.log_softmax(1)
    most = part.max(logits.amax(1))
    total = part.sum((logits - most[:, None]).exp().sum(1))
    return logits - (most + total.log())[:, None]
