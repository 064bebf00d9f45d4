"""Mamba 2: layers of a state space with one decay a head alone.

Source  Dao and Gu 2024, arXiv:2405.21060.
"""

from typing import Any, ClassVar, Literal

from castalia.models.families.recurrent import Recurrent, RecurrentConfig
from castalia.models.kinds.mamba2 import Mamba2


class Mamba2Config(RecurrentConfig):
    """One decoder of the family."""

    family: Literal["mamba2"] = "mamba2"
    """Mamba 2."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "norm": "rmsnorm",
        "tie_word_embeddings": True,
        # One part a layer leads back into the residual stream, not two.
        "output_layer_init_method": "single_residual_scaled_normal",
    }


class Mamba2Family(Recurrent):
    """What the rest of Castalia knows of the family."""

    name = "mamba2"
    Config = Mamba2Config
    kind = Mamba2()
