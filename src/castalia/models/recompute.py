"""Activation recompute: what a block of layers stores for the backward pass, and what that computes again.

full       a block stores its input alone; the whole forward runs again in the backward, about a third more FLOPs.
selective  it stores what is dear to make, the attention and the widest product (MLP up), and makes norms, GELU and the
           narrow products again (Korthikanti et al. 2022, arXiv:2205.05198, section 5, keeps what is dear in memory
           out; here attention is linear in memory already).
n          full in every n-th block, nothing in the others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import castalia.models.parts.causal_attention  # noqa: F401  registers the operator named below
from castalia.models.tiles import Kind

aten, ours = torch.ops.aten, torch.ops.castalia
ATTENTION = {
    ours.causal_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
PRODUCTS = {aten.mm.default: 1, aten.addmm.default: 2}
"""Matrix products, and which argument is the (in, out) matrix."""


def recomputed(
    kind: Kind, width: int | None, function: Callable[..., Tensor], *inputs: Any
) -> Tensor:
    """function(*inputs), stored as `kind` says; products of at least `width` are kept by "selective"."""
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = partial(
            create_selective_checkpoint_contexts, partial(policy, width)
        )
    out: Tensor = checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts
    )
    return out


def policy(
    width: int | None, context: Any, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    """Whether the result of one operator is kept."""
    place = PRODUCTS.get(operator)
    wide = place is not None and width is not None and arguments[place].shape[-1] >= width
    if wide or operator in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
