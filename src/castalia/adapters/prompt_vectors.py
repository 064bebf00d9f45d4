"""The module of a soft prompt."""

import torch
from torch import Tensor, nn

from castalia.models.parts.norms import local


class PromptVectors(nn.Module):
    """Vectors for the first places of a row, in place of those of the tokens that stand there."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, x_BTC: Tensor, places: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C); places (1 or B, T) int64, in the row, of the tokens held here."""
        table = local(self.weight)
        vectors = table[places.clamp(max=len(table) - 1)].to(x_BTC.dtype)
        return torch.where((places < len(table))[..., None], vectors, x_BTC)
