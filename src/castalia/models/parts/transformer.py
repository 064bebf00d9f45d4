"""A transformer block of any attention, norm and MLP that a config asks for."""

import torch
from torch import Tensor

from castalia.models.block import Block
from castalia.models.config import AttentionKind, TransformerConfig
from castalia.models.context import Context
from castalia.models.parts.attention import Attention
from castalia.models.parts.dropout import ATTENTION_OUT, MLP_OUT, drop_hidden
from castalia.models.parts.mixture import MixtureMLP
from castalia.models.parts.mlp import MLP, GatedMLP
from castalia.models.parts.norms import make_norm
from castalia.models.state import LayerState


class TransformerBlock(Block):
    """Attention and MLP, parallel or serial, with norms before or after them.

    Parallel: x + attn(norm1 x) + mlp(norm2 x), or norm1 for both. Serial: each on the sum before
    it. Serial with norms after: x + norm1(attn x), then x + norm2(mlp x).
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.kind: AttentionKind = config.layer_kind(layer)
        self.parallel = config.parallel_residual
        self.after = config.norm_placement == "post"
        # The order of the parts is the order of the parameters, and with it that of the sum of the
        # gradient norm: another order gives another last bit.
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = None if config.shared_norm else make_norm(config)
        self.mlp: MLP | GatedMLP | MixtureMLP
        if config.has_experts(layer):
            self.mlp = MixtureMLP(config, layer)
        else:
            kind = GatedMLP if config.gated else MLP
            self.mlp = kind(config.hidden_size, config.ffn_size, config.activation, config.mlp_bias)
            self.widest = self.mlp.up.out_features

    @property
    def tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """Norms work on T / tp tokens, whose statistics are their own. The parts split their
        matrices."""
        how = "added" if self.after else "sequence"
        return {"norm1": how, "norm2": how}

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if context.masks is not None:
            context = context._replace(mask=context.masks[self.kind])
        if context.block_masks is not None:
            context = context._replace(block_mask=context.block_masks[self.kind])
        if self.after:
            return self.norms_after(x_BTC, context)
        normed_BTC: Tensor = self.norm1(x_BTC)
        attn_BTC = drop_hidden(self.attn(normed_BTC, context), context.draws, ATTENTION_OUT)
        if self.parallel:
            # The two small sums are added first: x is much larger, and adding it last rounds once.
            inner_BTC = normed_BTC if self.norm2 is None else self.norm2(x_BTC)
            mlp_BTC = drop_hidden(self.mlp(inner_BTC, context.draws), context.draws, MLP_OUT)
            return x_BTC + (attn_BTC + mlp_BTC)
        assert self.norm2 is not None
        x_BTC = x_BTC + attn_BTC
        mlp_BTC = drop_hidden(self.mlp(self.norm2(x_BTC), context.draws), context.draws, MLP_OUT)
        return x_BTC + mlp_BTC

    def norms_after(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The block of OLMo 2: what a part adds is normed, not what it reads."""
        assert self.norm2 is not None
        # Normed in the dtype of the stream: torch has no fused norm of bf16 with fp32 weights.
        attn_BTC: Tensor = self.norm1(self.attn(x_BTC, context).to(x_BTC.dtype))
        x_BTC = x_BTC + drop_hidden(attn_BTC, context.draws, ATTENTION_OUT)
        mlp_BTC: Tensor = self.norm2(self.mlp(x_BTC, context.draws).to(x_BTC.dtype))
        mlp_BTC = drop_hidden(mlp_BTC, context.draws, MLP_OUT)
        return x_BTC + mlp_BTC

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> LayerState:
        """The keys and values of the attention; the MLP remembers nothing."""
        return self.attn.new_state(batch, length, dtype, device)
