"""OLMo 2.

By default LLaMA with norms after each part, and of queries and keys.

Source  OLMo team 2024, arXiv:2501.00656.
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class Olmo2Config(TransformerConfig):
    """One decoder of the family."""

    family: Literal["olmo2"] = "olmo2"
    """OLMo 2."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "norm": "rmsnorm",
        "norm_placement": "post",
        "qk_norm": "width",
        "layernorm_epsilon": 1e-6,
        "activation": "swiglu",
        "parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
    }


class Olmo2(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "olmo2"
    Config = Olmo2Config
