"""Mistral.

By default LLaMA with grouped queries and a sliding window.

Source  Jiang et al. 2023, arXiv:2310.06825.
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class MistralConfig(TransformerConfig):
    """One decoder of the family."""

    family: Literal["mistral"] = "mistral"
    """Mistral."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "parallel_residual": False,
        "rotary_pct": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": 4096,
    }


class Mistral(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "mistral"
    Config = MistralConfig
