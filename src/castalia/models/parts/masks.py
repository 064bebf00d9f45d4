"""Who may see whom: the mask of a pass, from the state or from the documents of each row."""

import torch
from torch import Tensor

from castalia.models.context import Context, RowShare
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
