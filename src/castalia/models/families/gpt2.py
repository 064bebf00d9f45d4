"""GPT-2, and GPT-NeoX's models with learned positions.

By default serial blocks with learned positions.

Source  Radford et al. 2019, "Language models are unsupervised multitask learners".
"""

from typing import Any, ClassVar, Literal

from castalia.models.config import TransformerConfig
from castalia.models.families.transformer import Transformer


class Gpt2Config(TransformerConfig):
    """One decoder of the family."""

    family: Literal["gpt2"] = "gpt2"
    """GPT-2, and GPT-NeoX's models with learned positions."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "pos_emb": "learned",
        "parallel_residual": False,
        "tie_word_embeddings": True,
    }


class Gpt2(Transformer):
    """What the rest of Castalia knows of the family."""

    name = "gpt2"
    Config = Gpt2Config
