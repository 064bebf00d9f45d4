"""The MLP between two residual additions, plain or with a gate."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models.activations import Activation
from castalia.models.parts.dropout import Draws, project

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
"""Twice the constant of the tanh form, GPT-NeoX's 0.79788456."""


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    if torch.compiler.is_compiling():
        # Written with a sigmoid, 1 + tanh(u) = 2 sigmoid(2u), the fused kernel takes a third of the
        # time; eager mode would store every intermediate result, so it keeps the operator.
        y = x.float()
        return (y * torch.sigmoid(GELU_SCALE * y * (1 + 0.044715 * y * y))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU; So et al. 2021, arXiv:2109.08668."""
    return F.relu(x).square()


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "softsign": F.softsign,
    "swish": F.silu,
    "silu": F.silu,
    "mish": F.mish,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": F.relu,
    "swiglu": F.silu,
    "bilinear": lambda gate: gate,
    "glu": torch.sigmoid,
}
"""The function of each activation, of the gate where there is one.

Source  Shazeer 2020, arXiv:2002.05202 (the gated ones); Misra 2019, arXiv:1908.08681 (mish).
"""


class MLP(nn.Module):
    """Up, activation, down."""

    tp_plan = {"up": "column", "down": "row"}

    def __init__(self, width: int, inner: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.function = FUNCTIONS[activation]
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTC: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return project(self.down, self.function(project(self.up, x_BTC, draws)), draws)


class GatedMLP(nn.Module):
    """Up times the activation of the gate, then down."""

    # The input is gathered once for both matrices.
    tp_plan = {"": "gathered", "gate": "columns", "up": "columns", "down": "row"}

    def __init__(self, width: int, inner: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.function = FUNCTIONS[activation]
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTC: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate_BTF = self.function(project(self.gate, x_BTC, draws))
        return project(self.down, gate_BTF * project(self.up, x_BTC, draws), draws)
