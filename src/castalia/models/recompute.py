"""Activation recompute: what a layer stores for the backward pass, and what it computes again.

full       A layer stores its input alone. Its whole forward runs again in the backward, which costs
           about a third more FLOPs.
selective  A layer stores what is expensive to compute, its attention and widest product (MLP up),
           and computes norms, GELU and the narrow products again. Korthikanti et al. 2022,
           arXiv:2205.05198, section 5, drop the attention, which is large in their kernels; ours is
           linear in memory already.
n          full in every n-th layer, nothing in the others.
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

import castalia.attention.fused_attention
import castalia.models.parts.causal_attention
import castalia.products  # noqa: F401  all three register operators named below
from castalia.models.tiles import Recompute

aten = torch.ops.aten
ours = torch.ops.castalia
ATTENTION = {
    ours.causal_attention.default,
    ours.fused_attention.default,
    torch.ops.higher_order.flex_attention,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operators whose results "selective" keeps: ours, and the kernels behind torch's functions."""
PRODUCTS = {aten.mm.default: (1, 1), aten.addmm.default: (2, 1), ours.onednn_linear.default: (1, 0)}
"""Matrix products, which argument is the matrix of weights, and its dim of the outputs."""


def recomputed(
    kind: Recompute, width: int | None, function: Callable[..., Tensor], *inputs: Any
) -> Tensor:
    """function(*inputs), stored as `kind` says; "selective" keeps products from `width` columns on.

    width  None keeps no product.
    """
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = partial(
            create_selective_checkpoint_contexts, partial(policy, width)
        )
    # The random state is not saved and restored: no block draws random numbers.
    out: Tensor = checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts
    )
    return out


def policy(
    width: int | None, context: Any, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    """Whether the result of one operator is kept."""
    wide = False
    if operator in PRODUCTS and width is not None:
        place, dim = PRODUCTS[operator]
        wide = arguments[place].shape[dim] >= width
    if wide or operator in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
