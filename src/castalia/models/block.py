"""`Block`: the base class of a model's layers, whatever their family."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from castalia.models.context import Context
from castalia.models.recompute import recomputed
from castalia.models.state import LayerState
from castalia.models.tiles import Recompute


class Block(nn.Module):
    """One layer. A family's block implements `compute` and `new_state`."""

    tp_plan: ClassVar[dict[str, str]] = {}
    """How tensor parallelism splits the modules inside, in the words of castalia.distributed."""
    hands_on: int = 0
    """Numbers of each token that the block appends to its output for all later blocks, which find
    them as `Context.carried`; its family declares them as `carries`."""
    widest: int | None = None
    """Width from which selective recompute keeps a matrix product; None keeps attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute: Recompute = ""

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # Decided in here, inside the module that torch.compile and FSDP2 wrap: around a compiled
        # block, checkpointing could not see the operators that selective recompute chooses among.
        # Never with a state, which a second run would append to twice.
        if self.recompute and context.state is None and torch.is_grad_enabled():
            context = context._replace(spares_memory=True)
            return recomputed(self.recompute, self.widest, self.compute, x_BTC, context)
        return self.compute(x_BTC, context)

    @abstractmethod
    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The layer itself, (B, T, C) -> (B, T, C)."""

    @abstractmethod
    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> LayerState:
        """What this layer remembers of `batch` rows of at most `length` tokens, empty."""
