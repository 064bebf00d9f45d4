"""Falcon 7B and 40B, and the ALiBi models of RefinedWeb.

By default parallel blocks of multi-query attention, with one norm for both parts.

Source  Almazrouei et al. 2023, arXiv:2311.16867; Penedo et al. 2023, arXiv:2306.01116.
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class FalconConfig(TransformerConfig):
    """One decoder of the family."""

    family: Literal["falcon"] = "falcon"
    """Falcon 7B and 40B, and the ALiBi models of RefinedWeb."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "num_kv_heads": 1,
        "shared_norm": True,
        "activation": "gelu",
        "rotary_pct": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


class Falcon(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "falcon"
    Config = FalconConfig
