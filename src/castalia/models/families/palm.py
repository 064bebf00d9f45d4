"""PaLM.

By default parallel blocks of multi-query attention and SwiGLU, with one norm for both parts.

Source  Chowdhery et al. 2022, arXiv:2204.02311.
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class PalmConfig(TransformerConfig):
    """One decoder of the family."""

    family: Literal["palm"] = "palm"
    """PaLM."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "num_kv_heads": 1,
        "shared_norm": True,
        "activation": "swiglu",
        "rotary_pct": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


class Palm(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "palm"
    Config = PalmConfig
