"""The MLP between two residual additions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
"""Twice the constant of the tanh form, GPT-NeoX's 0.79788456."""


class MLP(nn.Module):
    """Up, GELU, down. `activation` is gelu, the exact erf form, or gelu_tanh."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.approximate = "tanh" if activation == "gelu_tanh" else "none"
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.down(self.activate(self.up(x_BTC)))
        return out

    def activate(self, x: Tensor) -> Tensor:
        """GELU."""
        if self.approximate == "tanh" and torch.compiler.is_compiling():
            # Written with a sigmoid, 1 + tanh(u) = 2 sigmoid(2u), the fused kernel takes a third of
            # the time; eager mode would store every intermediate result, so it keeps the operator.
            y = x.float()
            return (y * torch.sigmoid(GELU_SCALE * y * (1 + 0.044715 * y * y))).to(x.dtype)
        return F.gelu(x, approximate=self.approximate)
