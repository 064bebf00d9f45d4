"""StableLmForCausalLM, which expresses PaLM as GPT-NeoX builds it.

LayerNorm with biases, SwiGLU, and parallel blocks with one norm for both parts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from castalia.checkpoint.hf.format import TransformerFormat
from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import SHAPE, LlamaShaped
from castalia.models.config import TransformerConfig
from castalia.models.families.palm import PalmConfig


class StableLmFormat(LlamaShaped):
    """StableLM in transformers."""

    model_type = "stablelm"
    architectures = ("StableLmForCausalLM",)
    classifier = "StableLmForSequenceClassification"
    families = ("palm",)
    Config = PalmConfig
    key_heads = 32
    longest = 4096
    epsilon = ("layer_norm_eps", 1e-5)
    dropouts = TransformerFormat.dropouts
    share = "partial_rotary_factor"
    expresses = SHAPE | {
        "norm": ("layernorm",),
        "parallel_residual": (False, True),
        "shared_norm": (False, True),
        "rotary_pct": None,
        "qkv_bias": (None, True),
        "attention_head_dim": (None,),
    }

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """Its parallel blocks have one norm."""
        if config.parallel_residual and not config.shared_norm:
            yield "shared_norm=false"

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        keys.only("qk_layernorm", False)
        parallel = keys.take("use_parallel_residual", False)
        return super().read_options(keys, shape) | {
            "parallel_residual": parallel,
            "shared_norm": parallel,
            "qkv_bias": keys.take("use_qkv_bias", False),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {
            "use_parallel_residual": config.parallel_residual,
            "use_qkv_bias": config.has_qkv_bias,
            "qk_layernorm": False,
        }
