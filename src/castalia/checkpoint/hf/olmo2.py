"""Olmo2ForCausalLM and OlmoForCausalLM.

OLMo 2 is LLaMA's shape with the norms behind each part; OLMo 1 has norms without parameters.
"""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import PARTS, PLACES, SHAPE, LlamaShaped
from castalia.models.config import TransformerConfig
from castalia.models.families.llama import LlamaConfig
from castalia.models.families.olmo2 import Olmo2Config

AFTER = PARTS | {
    "attention_norm": "post_attention_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
}


class Olmo2Format(LlamaShaped):
    """OLMo 2 in transformers."""

    model_type = "olmo2"
    architectures = ("Olmo2ForCausalLM",)
    families = ("olmo2",)
    Config = Olmo2Config
    places = PLACES._replace(parts=AFTER)
    epsilon = ("rms_norm_eps", 1e-5)
    expresses = SHAPE | {
        "norm_placement": ("post",),
        "qk_norm": ("width",),
        "attention_bias": (False, True),
    }

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        options = super().read_options(keys, shape)
        return options | {"attention_bias": keys.take("attention_bias", False)}

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {"attention_bias": config.attention_bias}


class OlmoFormat(LlamaShaped):
    """OLMo 1 in transformers, which is read as LLaMA with norms without parameters."""

    model_type = "olmo"
    architectures = ("OlmoForCausalLM",)
    families = ()
    Config = LlamaConfig
    places = PLACES
    epsilon = None
    expresses = SHAPE | {
        "norm": ("non_parametric_layernorm",),
        "attention_bias": (False, True),
        "layernorm_epsilon": (1e-5,),
    }

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        keys.only("clip_qkv", None)
        return super().read_options(keys, shape) | {
            "norm": "non_parametric_layernorm",
            "attention_bias": keys.take("attention_bias", False),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {"attention_bias": config.attention_bias}
