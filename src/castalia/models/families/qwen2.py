"""Qwen 2 and 2.5; with qk_norm=head and qkv_bias=false, Qwen 3.

By default LLaMA with biases of queries, keys and values.

Source  Qwen team 2024, arXiv:2407.10671; 2025, arXiv:2505.09388.
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class Qwen2Config(TransformerConfig):
    """One decoder of the family."""

    family: Literal["qwen2"] = "qwen2"
    """Qwen 2 and 2.5; with qk_norm=head and qkv_bias=false, Qwen 3."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "norm": "rmsnorm",
        "layernorm_epsilon": 1e-6,
        "activation": "swiglu",
        "parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 1000000.0,
        "attention_bias": False,
        "qkv_bias": True,
        "mlp_bias": False,
    }


class Qwen2(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "qwen2"
    Config = Qwen2Config
