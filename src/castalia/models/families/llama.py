"""LLaMA 1, 2 and 3, and Code Llama.

By default serial blocks of RMSNorm, rotary attention and SwiGLU, without biases.

Source  Touvron et al. 2023, arXiv:2302.13971, arXiv:2307.09288; Dubey et al. 2024,
        arXiv:2407.21783; Roziere et al. 2023, arXiv:2308.12950.
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class LlamaConfig(TransformerConfig):
    """One decoder of the family."""

    family: Literal["llama"] = "llama"
    """LLaMA 1, 2 and 3, and Code Llama."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "parallel_residual": False,
        "rotary_pct": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    }


class Llama(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "llama"
    Config = LlamaConfig
