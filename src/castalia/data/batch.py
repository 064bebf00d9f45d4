"""`Batch`: what goes from data to the loss."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not a target."""


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch.

    Shapes  tokens, labels (B, T) int64, labels -100 where there is no target; positions, segments (B, T) int64 or
            None, which means 0..T-1 and one document a row; source (B,) int32, the place of the row's source in
            data.train; index (B,) int64, the row's place in the served order.
    """

    tokens: Tensor
    labels: Tensor
    source: Tensor
    index: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    @property
    def targets(self) -> int:
        """Number of labels that count in the loss."""
        return int((self.labels != IGNORED).sum())

    def of_tokens(self, choose: Callable[[Tensor], Tensor]) -> "Batch":
        """The same rows with some of their tokens: `choose` takes (B, T) to (B, fewer)."""
        chosen = {
            name: choose(held)
            for name in ("tokens", "labels", "positions", "segments")
            if (held := getattr(self, name)) is not None
        }
        return replace(self, **chosen)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        held = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {
            k: v if v is None else v.to(device, non_blocking=True) for k, v in held
        }
        return Batch(**moved)
