"""A block of one mixer with a state: x + mixer(norm x)."""

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from castalia.models.block import Block
from castalia.models.context import Context
from castalia.models.model_config import BlocksConfig
from castalia.models.parts.dropout import MLP_OUT, drop_hidden
from castalia.models.parts.norms import make_norm
from castalia.models.state import RecurrentState
from castalia.recurrent.held import ChannelShare


class StateSpaceMixer(Protocol):
    """What a mixer of castalia.recurrent has."""

    def __call__(
        self,
        x_BTC: Tensor,
        segments: Tensor | None,
        kept: dict[str, Tensor] | None,
        share: ChannelShare,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""

    def remembered(
        self, batch: int, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The state before the first token, by name, each (B, ...)."""


class StateSpaceBlock(Block):
    """Norm, mixer and residual."""

    # The norm works on T / tp tokens, the mixer on all T of its part of the channels, which its own
    # plan splits.
    tp_plan = {"norm": "sequence", "mixer": "gathered"}

    def __init__(self, config: BlocksConfig, mixer: nn.Module, widest: int) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = mixer
        self.widest = widest

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        kept: dict[str, Tensor] | None = None
        if context.state is not None:
            assert isinstance(context.state, RecurrentState)
            kept = context.state.kept
        mixer = cast(StateSpaceMixer, self.mixer)
        mixed_BTC = mixer(self.norm(x_BTC), context.segments, kept, context.heads)
        return x_BTC + drop_hidden(mixed_BTC, context.draws, MLP_OUT)

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> RecurrentState:
        """The mixer's; its size does not depend on `length`."""
        return RecurrentState(**cast(StateSpaceMixer, self.mixer).remembered(batch, dtype, device))
