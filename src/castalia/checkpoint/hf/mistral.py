"""MistralForCausalLM: LLaMA's shape, with one sliding window for all layers."""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import SHAPE, LlamaShaped
from castalia.models.config import TransformerConfig
from castalia.models.families.mistral import MistralConfig


class MistralFormat(LlamaShaped):
    """Mistral in transformers."""

    model_type = "mistral"
    architectures = ("MistralForCausalLM",)
    classifier = "MistralForSequenceClassification"
    families = ("mistral",)
    Config = MistralConfig
    expresses = SHAPE | {"sliding_window": None}
    key_heads = 8
    longest = 131072

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        # Null means no window, a missing key the window of the first Mistral.
        given = "sliding_window" in keys.left
        window = keys.take("sliding_window") if given else 4096
        return super().read_options(keys, shape) | {"sliding_window": window}

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        window = config.sliding_window if "sliding" in config.layer_kinds else None
        return super().write_config(config) | {"sliding_window": window}
