"""Gradients of a model on several ranks: sums, their norm, and clipping.

Every rank's gradient is an addend of the gradient of the summed loss. FSDP2 sums the sharded ones
in its reduce-scatter (see `castalia.distributed.layout`); `sum_plain_gradients` sums those of
parameters that are not sharded. Nothing is averaged: a single averaging factor is wrong as soon as
parameters are sharded over groups of different sizes, as experts are.
"""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from castalia.distributed.boxes import holds_first_copy
from castalia.distributed.world import World


def sum_plain_gradients(model: nn.Module, world: World) -> None:
    """Sum the gradients of plain parameters over the ranks with different parts of the batch.

    A plain parameter is whole on every rank, and its gradient covers this rank's rows only. Tensor
    parallelism refuses plain parameters, so no other axis needs a sum.
    """
    if world.size == 1:
        return
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None and not isinstance(gradient, DTensor):
            world.sum(gradient)


def gradient_norm(model: nn.Module, without: Collection[str] = ()) -> Tensor:
    """Global L2 norm of all gradients, whatever their kind of tensor.

    Shapes  -> float32 scalar on the model's device, equal on all ranks.

    Replicated values are counted once; one all-reduce of a sum of squares. Plain gradients are
    equal on all ranks, so they are added after it. `without` names parameters that another stage of
    a pipeline counts.
    """
    named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
    gradients = [
        gradient for name, gradient in named if gradient is not None and name not in without
    ]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    wide = all(gradient.dtype == torch.float32 for gradient in plain)
    if not sharded and wide and not on_several_ranks(model):
        # On one rank torch's own function is exact and makes no collective.
        return torch.nn.utils.get_total_norm(plain)
    device = next(model.parameters()).device
    total = sum_of_squares([g.to_local() for g in sharded if holds_first_copy(g)], device)
    if on_several_ranks(model):
        # Every rank enters this collective, also a rank whose parameters are all frozen.
        dist.all_reduce(total)
    return (total + sum_of_squares(plain, device)).sqrt()


def on_several_ranks(model: nn.Module) -> bool:
    """Whether the model is laid out over a mesh: then some of its parameters are DTensors."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all numbers, a float32 scalar."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    if tensors:
        # In fp32 also of bf16 gradients, whose norm has 8 bits otherwise.
        for norm in torch._foreach_norm(tensors, dtype=torch.float32):
            total += norm.square()
    return total


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # _foreach_mul_ takes one kind of tensor at a time: a DTensor among plain ones makes it fail.
    for kind in (True, False):
        chosen = [gradient for gradient in gradients if isinstance(gradient, DTensor) is kind]
        if chosen:
            torch._foreach_mul_(chosen, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float | None) -> None:
    """Scale gradients by min(1, limit / (norm + 1e-6)); `limit` None leaves them as they are.

    Source  The formula of DeepSpeed's and torch's clip_grad_norm_ alike.
    """
    if limit is not None and norm + 1e-6 > limit:
        scale_gradients(parameters, limit / (norm + 1e-6))
