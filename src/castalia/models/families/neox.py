"""GPT-NeoX and Pythia: by default parallel blocks of rotary attention and a GELU MLP.

Source  Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373 (Pythia).
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class NeoxConfig(TransformerConfig):
    """One decoder of the GPT-NeoX family, with any option that GPT-NeoX has."""

    family: Literal["neox"] = "neox"
    """GPT-NeoX, Pythia."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "init_method": "small_init",
        "output_layer_init_method": "wang_init",
    }
    FUSED_QKV: ClassVar[bool] = True


class Neox(Transformer):
    """What the rest of Castalia knows of GPT-NeoX."""

    name = "neox"
    Config = NeoxConfig
