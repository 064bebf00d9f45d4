"""What RWKV's mixers share: the token before, borders of documents, and fp32 under autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

Kept = dict[str, Tensor]
"""What a mixer remembers of the tokens that it has read, by name; it replaces the values."""


def runs_of(segments_BT: Tensor | None) -> Tensor | None:
    """Number of each token's document in its row, counted from 0, int64 (B, T).

    Equal numbers of `segments_BT` that another number separates are two documents.
    """
    if segments_BT is None:
        return None
    changes = segments_BT[:, 1:] != segments_BT[:, :-1]
    return F.pad(changes.long().cumsum(1), (1, 0))


def token_before(
    x_BTC: Tensor, runs_BT: Tensor | None = None, kept: Kept | None = None, name: str = ""
) -> Tensor:
    """Of each token the vector of the token before it; zeros before the first of a document.

    Shapes  x_BTC (B, T, C), runs_BT (B, T) of `runs_of` -> (B, T, C).
    With `kept` the row goes on after the token in kept[name], (B, C), which becomes its last one.
    """
    if kept is None:
        before_BTC = F.pad(x_BTC[:, :-1], (0, 0, 1, 0))
    else:
        first_BC = kept[name].to(x_BTC.dtype)
        before_BTC = torch.cat([first_BC[:, None], x_BTC[:, :-1]], 1)
        # A copy: a view would keep all tokens of a prompt.
        kept[name] = x_BTC[:, -1].to(kept[name].dtype, copy=True)
    if runs_BT is None:
        return before_BTC
    begins_BT = F.pad(runs_BT[:, 1:] != runs_BT[:, :-1], (1, 0))
    return before_BTC.masked_fill(begins_BT[..., None], 0.0)


def in_fp32(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast: decays and states of many tokens need fp32.

    On the meta device, where shapes and operations are counted, there is no autocast.
    """
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def into_chunks(x_BTHN: Tensor, size: int) -> Tensor:
    """(B, T, H, N) -> (B, H, chunks, size, N), padded with zeros at the end."""
    x_BTHN = F.pad(x_BTHN, (0, 0, 0, 0, 0, -x_BTHN.shape[1] % size))
    return x_BTHN.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous()


def out_of_chunks(x_BHnLN: Tensor, T: int) -> Tensor:
    """The way back to (B, T, H, N)."""
    return x_BHnLN.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]


class ChunkRuns:
    """Which tokens of a chunk belong together, as factors of 1 and 0 that broadcast over heads.

    pairs   (B, 1, n, L, L), whether two tokens are of one document.
    began   (B, 1, n, L, 1), whether a token's document began before its chunk.
    lasts   (B, 1, n, L, 1), whether it goes on after the chunk.
    through (B, 1, n, 1, 1), whether the document before the chunk goes on after it.
    """

    def __init__(self, runs_BT: Tensor, size: int) -> None:
        T = runs_BT.shape[1]
        # Padding belongs to the last document: it must not end it.
        padded = F.pad(runs_BT[:, None].float(), (0, -T % size), mode="replicate")[:, 0]
        runs = padded.unflatten(1, (-1, size))
        last = runs[:, :, -1:]
        before = torch.cat([runs[:, :1, :1], last[:, :-1]], 1)
        self.pairs = (runs[..., None] == runs[..., None, :])[:, None].float()
        self.began = (runs == before)[:, None, ..., None].float()
        self.lasts = (runs == last)[:, None, ..., None].float()
        self.through = (last == before)[:, None, ..., None].float()
