"""Mamba: layers of a selective state space alone.

Source  Gu and Dao 2023, arXiv:2312.00752.
"""

from typing import Any, ClassVar, Literal

from castalia.models.families.recurrent import Recurrent, RecurrentConfig
from castalia.models.kinds.mamba import Mamba


class MambaConfig(RecurrentConfig):
    """One decoder of the family."""

    family: Literal["mamba"] = "mamba"
    """Mamba."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "norm": "rmsnorm",
        "tie_word_embeddings": True,
        # One part a layer leads back into the residual stream, not two.
        "output_layer_init_method": "single_residual_scaled_normal",
    }


class MambaFamily(Recurrent):
    """What the rest of Castalia knows of the family."""

    name = "mamba"
    Config = MambaConfig
    kind = Mamba()
