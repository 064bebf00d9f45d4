"""A pre-norm transformer block around any attention and any MLP."""

import torch
from torch import Tensor, nn

from castalia.models.block import Block
from castalia.models.context import Context
from castalia.models.parts.attention import Attention
from castalia.models.parts.mlp import MLP
from castalia.models.state import LayerState


class TransformerBlock(Block):
    """Parallel: x + attn(norm1 x) + mlp(norm2 x). Serial: each on the sum before it."""

    # Each pair column, row needs one gather before and one reduction after, none in between. Norms
    # work on T / tp tokens, whose statistics are their own.
    tp_plan = {
        "norm1": "sequence",
        "attn.qkv": "column",
        "attn.out": "row",
        "norm2": "sequence",
        "mlp.up": "column",
        "mlp.down": "row",
    }

    def __init__(
        self, *, norm1: nn.Module, attn: Attention, norm2: nn.Module, mlp: MLP, parallel: bool
    ) -> None:
        super().__init__()
        self.parallel = parallel
        # The order of the parts is the order of the parameters, and with it that of the sum of the
        # gradient norm: another order gives another last bit.
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp
        self.widest = mlp.up.out_features

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        attn_BTC: Tensor = self.attn(self.norm1(x_BTC), context)
        if self.parallel:
            # The two small sums are added first: x is much larger, and adding it last rounds once.
            mlp_BTC: Tensor = self.mlp(self.norm2(x_BTC))
            return x_BTC + (attn_BTC + mlp_BTC)
        x_BTC = x_BTC + attn_BTC
        mlp_BTC = self.mlp(self.norm2(x_BTC))
        return x_BTC + mlp_BTC

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> LayerState:
        """The keys and values of the attention; the MLP remembers nothing."""
        return self.attn.new_state(batch, length, dtype, device)
