"""GraniteForCausalLM: LLaMA with factors of the embedding and of the logits."""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import LlamaFormat
from castalia.models.config import TransformerConfig


class GraniteFormat(LlamaFormat):
    """Granite in transformers, which is read as LLaMA.

    Published Granites have factors of the scores and of what is added to the residual stream, too,
    which Castalia does not implement.
    """

    model_type = "granite"
    architectures = ("GraniteForCausalLM",)
    families = ()
    expresses = {**LlamaFormat.expresses, "embedding_multiplier": None, "output_multiplier": None}

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        keys.only("residual_multiplier", 1.0)
        keys.take("attention_multiplier")
        scale = keys.take("logits_scaling", 1.0)
        if not isinstance(scale, int | float) or scale <= 0:
            raise keys.error("logits_scaling", scale, "expected a positive number")
        return super().read_options(keys, shape) | {
            "embedding_multiplier": keys.take("embedding_multiplier", 1.0),
            "output_multiplier": 1.0 / scale,
        }

    def read_config(
        self, values: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> TransformerConfig:
        """See `TransformerFormat`."""
        config = super().read_config(values, where, vocab_size)
        # Compared last, when the width of a head is known to be one.
        keys = Keys(values, where)
        # Without the key transformers gives the scores no factor at all.
        given = keys.take("attention_multiplier", 1.0)
        usual = config.head_dim**-0.5
        if given != usual:
            raise keys.error("attention_multiplier", given, f"only {usual} is supported")
        return config

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {
            "attention_multiplier": config.head_dim**-0.5,
            "residual_multiplier": 1.0,
            "embedding_multiplier": config.embedding_multiplier,
            "logits_scaling": 1.0 / config.output_multiplier,
        }
