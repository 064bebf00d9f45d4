"""Which models an engine with an implementation of its own can compute, declared as data.

An engine such as llama.cpp or our compiled step does not run the PyTorch modules: it computes the
options that its authors knew. A table of those options is compared with a model's config. An
option that is added to a family later is in no engine's table and is refused as soon as a model
uses it.
"""

from collections.abc import Collection, Mapping
from typing import get_args

from pydantic.fields import FieldInfo

from castalia.config.base import Config
from castalia.models.activations import Gated, Plain
from castalia.models.config import TransformerConfig
from castalia.models.model_config import ModelConfig
from castalia.models.windows import window

Values = Collection[object] | None
"""Values of one option that are implemented; None means any value, for instance a size."""

START: dict[str, Values] = {
    "init_method": None,
    "output_layer_init_method": None,
    "init_method_std": None,
    "hidden_dropout": None,
    "attention_dropout": None,
}
"""Options of training alone: the start weights and dropout. No text depends on them."""

ATTENTION = ("neox", "llama", "mistral", "falcon", "palm", "gpt2", "olmo2", "qwen2")
"""Families whose blocks are attention and an MLP and nothing else: their options say it all."""

BLOCKS = ("family", "pattern", "moe")
"""Options that decide what a layer is."""

SIZES: dict[str, Values] = START | {
    "num_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "num_kv_heads": None,
    "attention_head_dim": None,
    "intermediate_size": None,
    "vocab_size": None,
    "make_vocab_size_divisible_by": None,
    "max_position_embeddings": None,
    "layernorm_epsilon": None,
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "qkv_bias": (None, True, False),
    "mlp_bias": (True, False),
}
"""Options that an engine of any attention model takes as they come."""

NEOX: dict[str, Values] = START | {
    "family": ("neox",),
    "num_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "vocab_size": None,
    "make_vocab_size_divisible_by": None,
    "max_position_embeddings": None,
    "rotary_pct": None,
    "rotary_emb_base": None,
    "rope_numerics": ("fp32", "neox_v1_fp16"),
    "parallel_residual": (True, False),
    "tie_word_embeddings": (True, False),
    "activation": ("gelu", "gelu_tanh"),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "layernorm_epsilon": None,
}
"""The GPT-NeoX family, whole. Engines that lack a value replace its entry."""


NATIVE: dict[str, Values] = NEOX | {
    "family": ATTENTION,
    "num_kv_heads": None,
    "attention_head_dim": None,
    "activation": get_args(Plain) + get_args(Gated),
    "qkv_bias": None,
    "qk_norm": ("none", "head", "width", "neox"),
    "norm": ("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"),
    "rmsnorm_partial": None,
    "norm_placement": ("pre", "post"),
    "shared_norm": (True, False),
    "pos_emb": ("rotary", "alibi", "learned", "sinusoidal", "rpe", "none"),
    "rope_scaling": None,
    "learned_offset": None,
    "alibi_scaled": (True, False),
    "alibi_numerics": ("fp32", "bf16"),
    "rpe_num_buckets": None,
    "rpe_max_distance": None,
    "sliding_window": None,
    "attention_config": None,
    "embedding_multiplier": None,
    "output_multiplier": None,
}
"""The transformers of the native engine, which also refuses dynamic rope_scaling and some kinds of
attention_config."""


def unimplemented(config: ModelConfig, table: Mapping[str, Values]) -> str | None:
    """The first option of `config` that `table` lacks, as NAME=VALUE; None if it has them all."""
    fields = type(config).model_fields
    # What a layer is comes before its sizes: it says most in one word.
    for name in sorted(fields, key=lambda name: name not in BLOCKS):
        field = fields[name]
        value = getattr(config, name)
        if name not in table:
            if value != neutral(name, field):
                # A section has many values, and none of them is known here.
                return f"model.{name}" if isinstance(value, Config) else f"{name}={value!r}"
            continue
        values = table[name]
        if isinstance(value, Config):
            # A section, such as rope_scaling: its kind decides what is computed.
            name = f"{name}.kind"
            value = getattr(value, "kind", value)
        if values is not None and value not in values:
            return f"{name}={value!r}, only {', '.join(map(repr, values))}"
    return None


def neutral(name: str, field: FieldInfo) -> object:
    """The value of an option that existed before it had a name, which every engine computes."""
    # A family's own default may be another computation, which only its table can vouch for.
    common = TransformerConfig.model_fields.get(name, field)
    return common.get_default(call_default_factory=True)


def patterned(config: TransformerConfig) -> bool:
    """Whether a layer sees a pattern of the tokens other than a window."""
    return not {"global", "sliding"}.issuperset(config.layer_kinds)


def mixed_windows(config: TransformerConfig) -> bool:
    """Whether some layers have a window that hides tokens, and others see all."""
    return len(config.layer_kinds) > 1 and window(config) is not None
