"""Qwen2ForCausalLM and Qwen3ForCausalLM: LLaMA's shape, with a sliding window in some layers."""

from collections.abc import Iterator, Mapping
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import SHAPE, LlamaShaped
from castalia.checkpoint.hf.options import Values
from castalia.core.errors import ConfigError
from castalia.models.config import TransformerConfig
from castalia.models.families.qwen2 import Qwen2Config

KINDS = {"full_attention": "global", "sliding_attention": "sliding"}
"""transformers' kinds of attention, and ours."""
WINDOWS: dict[str, Values] = {"sliding_window": None, "attention_config": None}


class Qwen2Format(LlamaShaped):
    """Qwen 2 and 2.5 in transformers."""

    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    classifier = "Qwen2ForSequenceClassification"
    families = ("qwen2",)
    Config = Qwen2Config
    expresses = SHAPE | WINDOWS | {"qkv_bias": (True, None)}
    key_heads = 32
    longest = 32768

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """Biases of queries, keys and values, which it always has; kinds of attention."""
        if not config.has_qkv_bias:
            yield "qkv_bias=false"
        yield from foreign_kinds(config)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        return super().read_options(keys, shape) | read_windows(keys, shape["num_layers"])

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | written_windows(config)


class Qwen3Format(Qwen2Format):
    """Qwen 3 in transformers."""

    model_type = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    classifier = "Qwen3ForSequenceClassification"
    expresses = SHAPE | WINDOWS | {"qk_norm": ("head",), "attention_bias": (False, True)}
    head_dim = 128

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """Kinds of attention."""
        return foreign_kinds(config)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        bias = keys.take("attention_bias", False)
        return super().read_options(keys, shape) | {
            "attention_bias": bias,
            "qkv_bias": bias,
            "qk_norm": "head",
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {"attention_bias": config.attention_bias}


def foreign_kinds(config: TransformerConfig) -> Iterator[str]:
    """Kinds of attention that transformers' layer_types lack."""
    for kind in config.layer_kinds:
        if kind not in KINDS.values():
            yield f"attention_config={kind}"


def read_windows(keys: Keys, layers: int) -> dict[str, Any]:
    """Our window and its layers.

    Raises  ConfigError for an unknown kind of layer.
    """
    used = keys.take("use_sliding_window", False)
    # Null means no window, a missing key this one.
    window = keys.take("sliding_window", None if "sliding_window" in keys.left else 4096)
    full = keys.take("max_window_layers", 28)
    kinds = keys.take("layer_types")
    if not used:
        window = None
    if kinds is None:
        # Not so many sliding layers, as the name says, but the first of them.
        kinds = [
            "sliding_attention" if window and i >= full else "full_attention" for i in range(layers)
        ]
    if not isinstance(kinds, list):
        raise keys.error("layer_types", kinds, "expected a list of kinds")
    unknown = [kind for kind in kinds if kind not in list(KINDS)]
    if unknown:
        raise keys.error("layer_types", unknown[0], f"choose among {', '.join(KINDS)}")
    if len(kinds) != layers:
        raise ConfigError(
            f"{keys.where}: layer_types has {len(kinds)} kinds, num_hidden_layers is {layers}"
        )
    ours = [KINDS[kind] for kind in kinds]
    if "sliding" not in ours:
        return {"sliding_window": None}
    if window is None:
        raise ConfigError(
            f"{keys.where}: layer_types has sliding layers, and no sliding_window is in use"
        )
    return {
        "sliding_window": window,
        "attention_config": None if "global" not in ours else ours,
    }


def written_windows(config: TransformerConfig) -> dict[str, Any]:
    """The keys of transformers."""
    names = {ours: theirs for theirs, ours in KINDS.items()}
    kinds = [config.layer_kind(layer) for layer in range(config.num_layers)]
    slides = "sliding" in kinds
    return {
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window if slides else None,
        # Read by versions without layer_types.
        "max_window_layers": kinds.index("sliding") if slides else config.num_layers,
        "layer_types": [names[kind] for kind in kinds],
    }
