"""Blocks of RWKV: time mixing, then channel mixing, each with a norm before it.

The model's layer 0 norms the embedding first. All these norms are LayerNorms.
"""

import torch
from torch import Tensor

from castalia.models.block import Block
from castalia.models.context import Context
from castalia.models.model_config import BlocksConfig
from castalia.models.parts.dropout import ATTENTION_OUT, MLP_OUT, drop_hidden
from castalia.models.parts.norms import LayerNorm
from castalia.models.state import LayerState, RecurrentState
from castalia.recurrent.options import Rwkv6Options, Rwkv7Options
from castalia.recurrent.rwkv6 import ChannelMix6, TimeMix6
from castalia.recurrent.rwkv7 import ChannelMix7, TimeMix7
from castalia.recurrent.token_shift import Kept, runs_of


class RwkvBlock(Block):
    """What the versions share: norms, and a state of constant size."""

    def __init__(self, config: BlocksConfig, layer: int, inner: int, head_size: int) -> None:
        super().__init__()
        self.width = config.hidden_size
        self.heads = inner // head_size
        self.head_size = head_size
        eps = config.layernorm_epsilon
        self.norm0 = LayerNorm(self.width, eps=eps) if layer == 0 else None
        self.norm1 = LayerNorm(self.width, eps=eps)
        self.norm2 = LayerNorm(self.width, eps=eps)

    def entered(self, x_BTC: Tensor) -> Tensor:
        """The stream as the block reads it; layer 0 norms the embedding."""
        if self.norm0 is None:
            return x_BTC
        normed_BTC: Tensor = self.norm0(x_BTC)
        return normed_BTC

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> LayerState:
        """The last token of both mixers, and a matrix for each head."""
        shift = (batch, self.width)
        matrices = (batch, self.heads, self.head_size, self.head_size)
        return RecurrentState(
            time_shift=torch.zeros(shift, dtype=dtype, device=device),
            channel_shift=torch.zeros(shift, dtype=dtype, device=device),
            # Sums over all tokens so far: in bf16 the later ones would get lost.
            wkv=torch.zeros(matrices, dtype=torch.float32, device=device),
        )


def kept_of(context: Context) -> Kept | None:
    """What the block remembers of earlier tokens, which its mixers replace; None in training."""
    if context.state is None:
        return None
    assert isinstance(context.state, RecurrentState)
    return context.state.kept


class Rwkv6Block(RwkvBlock):
    """A block of RWKV 6."""

    def __init__(self, config: BlocksConfig, layer: int) -> None:
        options = config.rwkv6 or Rwkv6Options()
        inner = options.inner(config.hidden_size)
        super().__init__(config, layer, inner, options.head_size)
        self.att = TimeMix6(config.hidden_size, options)
        self.ffn = ChannelMix6(config.hidden_size, options)
        self.widest = options.ffn(config.hidden_size)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        runs_BT = runs_of(context.segments)
        kept = kept_of(context)
        x_BTC = self.entered(x_BTC)
        mixed_BTC: Tensor = self.att(self.norm1(x_BTC), runs_BT, kept)
        x_BTC = x_BTC + drop_hidden(mixed_BTC, context.draws, ATTENTION_OUT)
        mixed_BTC = self.ffn(self.norm2(x_BTC), runs_BT, kept)
        return x_BTC + drop_hidden(mixed_BTC, context.draws, MLP_OUT)


class Rwkv7Block(RwkvBlock):
    """A block of RWKV 7. The first of a model hands its values on to all others."""

    def __init__(self, config: BlocksConfig, layer: int, first: bool) -> None:
        options = config.rwkv7 or Rwkv7Options()
        super().__init__(config, layer, config.hidden_size, options.head_size)
        self.att = TimeMix7(config.hidden_size, options, first)
        self.ffn = ChannelMix7(config.hidden_size, options)
        self.hands_on = config.hidden_size if first else 0
        self.widest = options.ffn(config.hidden_size)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), of the first block (B, T, 2 C): the stream and its values."""
        runs_BT = runs_of(context.segments)
        kept = kept_of(context)
        x_BTC = self.entered(x_BTC)
        mixed_BTC, values_BTC = self.att(self.norm1(x_BTC), context.carried, runs_BT, kept)
        x_BTC = x_BTC + drop_hidden(mixed_BTC, context.draws, ATTENTION_OUT)
        mixed_BTC = self.ffn(self.norm2(x_BTC), runs_BT, kept)
        x_BTC = x_BTC + drop_hidden(mixed_BTC, context.draws, MLP_OUT)
        return torch.cat([x_BTC, values_BTC], -1) if self.hands_on else x_BTC
