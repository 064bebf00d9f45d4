"""Who may see whom: the mask of a pass, from the state, the documents and the kind of attention."""

import torch
from torch import Tensor

from castalia.models.config import AttentionKind, TransformerConfig
from castalia.models.context import Context, RowShare
from castalia.models.parts.sparsity import sparse_mask
from castalia.models.sparsity import SPARSE
from castalia.models.state import ModelState


def visible_keys(context: Context, past: ModelState | None) -> Tensor | None:
    """Bool (1 or B, 1, T, keys), True where a query may see a key; None if plain causal."""
    # None wherever possible: without a mask the kernels skip later keys, with one they compute and
    # then hide them.
    if past is not None:
        return past.mask(context.positions.shape[1])
    if context.segments is not None:
        return segment_mask(context.segments, context.share)
    return None


def segment_mask(segments: Tensor, share: RowShare | None = None) -> Tensor:
    """Block-diagonal causal mask: (B, T) int64 -> bool (B, 1, T, keys)."""
    if share is None:
        return (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    # The keys are the whole row in its order, the queries this rank's chunks of it.
    keys = share.gather(segments, 1)
    same = segments[:, :, None] == keys[:, None, :]
    queries = share.positions(segments.shape[1]).to(segments.device)
    earlier = torch.arange(keys.shape[1], device=segments.device)[None, None] <= queries[..., None]
    return (same & earlier)[:, None]


def row_positions(context: Context, past: ModelState | None) -> tuple[Tensor, Tensor]:
    """Place in the row of each query held here and of each key: int64 (1 or B, T), (keys,).

    Not `context.positions`, which begin anew with each document of a row.
    """
    T = context.positions.shape[1]
    device = context.positions.device
    if past is not None:
        return past.positions(T), torch.arange(past.longest + T, device=device)
    if context.share is not None:
        keys = torch.arange(context.share.length(T), device=device)
        return context.share.positions(T).to(device), keys
    row = torch.arange(T, device=device)
    return row[None], row


def mask_of_kind(
    kind: AttentionKind,
    config: TransformerConfig,
    context: Context,
    past: ModelState | None,
    seen: Tensor | None,
) -> Tensor | None:
    """The mask of layers of one kind, bool (1 or B, 1 or heads here, T, keys), or None.

    seen  the mask of global attention, as of `visible_keys`.
    """
    if kind == "global":
        return seen
    if kind in SPARSE:
        near: Tensor | None = sparse_mask(
            kind, config, context.heads, *row_positions(context, past)
        )
    else:
        assert config.sliding_window is not None
        near = window_mask(config.sliding_window, context, past)
    if seen is None or near is None:
        return seen if near is None else near
    return seen & near


def window_mask(window: int, context: Context, past: ModelState | None) -> Tensor | None:
    """Bool (1 or B, 1, T, keys): the last `window` tokens; None where a row is no longer."""
    queries, keys = row_positions(context, past)
    if len(keys) <= window:
        return None
    distance = queries[..., None] - keys
    return ((distance >= 0) & (distance < window))[:, None]
