"""GPT-NeoX and Pythia: pre-norm blocks, parallel or serial, of rotary attention and a GELU MLP.

Source  Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373 (Pythia).
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat

from castalia.models.config import ModelConfig, TransformerConfig
from castalia.models.families.base import Axes, Costs, Family, LinearPart, NormPart, Parts, Stored
from castalia.models.starts import ONES, ZEROS, Init, Normal, Start, init_std

if TYPE_CHECKING:
    from torch import nn

    from castalia.models.block import Block
    from castalia.models.context import Context
    from castalia.models.state import ModelState


class NeoxConfig(TransformerConfig):
    """One decoder of the GPT-NeoX family."""

    family: Literal["neox"] = "neox"
    """GPT-NeoX, Pythia."""
    init_method: Init = "small_init"
    """Distribution of embedding, head, QKV and MLP-in weights at the start."""
    output_layer_init_method: Init = "wang_init"
    """Distribution of attention-out and MLP-out weights at the start."""
    init_method_std: NonNegativeFloat = 0.02
    """Standard deviation that normal and scaled_normal use."""

    FREE_AT_START: ClassVar[frozenset[str]] = ModelConfig.FREE_AT_START | {
        "init_method",
        "output_layer_init_method",
        "init_method_std",
    }


class Neox(Family):
    """What the rest of Castalia knows of GPT-NeoX."""

    name = "neox"
    Config = NeoxConfig
    # As GPT-NeoX, megatron/model/utils.py: biases and norms keep their size.
    no_decay = ("*bias", "*norm*.weight")
    rewinds = True
    splits_rows = True

    def block(self, config: NeoxConfig, layer: int) -> "Block":
        """Every layer is alike."""
        from castalia.models.parts.attention import Attention
        from castalia.models.parts.mlp import MLP
        from castalia.models.parts.transformer import TransformerBlock

        return TransformerBlock(
            norm1=self.norm(config),
            attn=Attention(config.hidden_size, config.num_attention_heads, config.attention_bias),
            norm2=self.norm(config),
            mlp=MLP(config.hidden_size, config.ffn_size, config.activation, config.mlp_bias),
            parallel=config.parallel_residual,
        )

    def norm(self, config: NeoxConfig) -> "nn.Module":
        """A LayerNorm."""
        from torch import nn

        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def complete(
        self, config: NeoxConfig, context: "Context", past: "ModelState | None"
    ) -> "Context":
        """Rotary tables, and who sees whom."""
        from castalia.models.parts.masks import visible_keys
        from castalia.models.parts.rotary import rope_tables

        rope = rope_tables(config, context.positions) if config.rotary_dim else None
        return context._replace(rope=rope, mask=visible_keys(context, past))

    def starts(self, config: NeoxConfig) -> list[tuple[str, Start]]:
        """As GPT-NeoX: what leads back into the residual stream starts smaller."""
        shape = (config.hidden_size, config.num_layers, config.init_method_std)
        inner = Normal(init_std(config.init_method, *shape))
        outer = Normal(init_std(config.output_layer_init_method, *shape))
        return [
            ("*.bias", ZEROS),
            ("*norm*.weight", ONES),
            ("*.attn.out.weight", outer),
            ("*.mlp.down.weight", outer),
            ("*.attn.qkv.weight", inner),
            ("*.mlp.up.weight", inner),
            ("*embed.weight", inner),
        ]

    def costs(self, config: NeoxConfig, layer: int) -> Costs:
        """Per layer 4 d^2 of attention, 2 d f of MLP, biases and two norms."""
        d = config.hidden_size
        f = config.ffn_size
        products = 4 * d * d + 2 * d * f
        biases = config.attention_bias * 4 * d + config.mlp_bias * (f + d)
        parameters = products + biases + 4 * d
        # Kept: q, k, v and the attention's output, MLP in and out; gathered: both norms' outputs.
        # Selective recompute drops the norms' outputs and that of the GELU.
        kept = Stored(
            residual=d,
            split=4 * d + 2 * f,
            gathered=2 * d,
            again_split=f,
            again_gathered=2 * d,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
        )
        return Costs(
            parameters=parameters,
            active=parameters,
            products=products,
            # Scores and weighted sums: 2 d multiply-adds a key, three times with the backward.
            flops_per_key=12 * d,
            kept=kept,
            tp_width=2 * d,
            cp_width=2 * config.kv_heads * config.head_dim,
        )

    def norm_parameters(self, config: NeoxConfig) -> int:
        """Weight and bias."""
        return 2 * config.hidden_size

    def divides(self, config: NeoxConfig, degrees: Axes) -> list[str]:
        """Heads and the MLP over tp."""
        heads = ("num_attention_heads", config.num_attention_heads, "a head stays whole on a rank")
        width = ("intermediate_size", config.ffn_size, "each rank holds an equal part of the MLP")
        return [
            f"model.{name} {size} is not divisible by parallel.tp={degrees.tp}: {why}"
            for name, size, why in (heads, width)
            if size % degrees.tp
        ]

    def parts(self, config: NeoxConfig) -> Parts:
        """QKV is fused, head by head."""
        d = config.hidden_size
        f = config.ffn_size
        heads = config.num_attention_heads
        linears = (
            LinearPart("qkv", "attn.qkv", 3 * d, d, config.attention_bias, fused_heads=heads),
            LinearPart("attention_out", "attn.out", d, d, config.attention_bias),
            LinearPart("mlp_up", "mlp.up", f, d, config.mlp_bias),
            LinearPart("mlp_down", "mlp.down", d, f, config.mlp_bias),
        )
        return Parts(linears, (NormPart("attention_norm", "norm1"), NormPart("mlp_norm", "norm2")))
