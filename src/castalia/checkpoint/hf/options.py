"""Which of our options an architecture of transformers has, compared with those that a model uses.

An architecture declares the values that it can express, by option. Every option that it does not
name must have the value of `TransformerConfig`, which is that of a decoder without the option. An
option that is added later is therefore refused by every architecture until it is named there.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from castalia.checkpoint.hf.keys import shown
from castalia.config.base import Config
from castalia.models.config import TransformerConfig
from castalia.models.model_config import START

Values = Collection[object] | None
"""Values of an option that can be expressed; None means any."""

SIZES: dict[str, Values] = {
    "num_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "layernorm_epsilon": None,
    "rotary_emb_base": None,
    "rope_scaling": None,
    "tie_word_embeddings": None,
}
"""Options that every architecture has."""
NO_EFFECT = frozenset(
    {
        *START,
        *TransformerConfig.FREE_AT_START,
        "family",
        # No config.json names the arithmetic of rotary tables; an export says so in a note.
        "rope_numerics",
        "hidden_dropout",
        "attention_dropout",
    }
)
"""Options that do not say what a trained model computes."""
NEEDS = {
    "rotary": ("rotary_pct", "rotary_emb_base", "rope_scaling"),
    "alibi": ("alibi_scaled", "alibi_numerics"),
    "learned": ("learned_offset",),
    "rpe": ("rpe_num_buckets", "rpe_max_distance"),
}
"""Options that count only with one value of pos_emb."""


def effective(config: TransformerConfig) -> dict[str, Any]:
    """The options in effect, in one spelling each.

    None stands for what follows from other options: as many key heads as query heads, heads that
    fill the width, biases as in the rest of the attention, the same attention in all layers.
    """
    values = {name: getattr(config, name) for name in type(config).model_fields}
    unread = {name for kind, names in NEEDS.items() if kind != config.pos_emb for name in names}
    values = {name: value for name, value in values.items() if name not in NO_EFFECT | unread}
    heads = config.num_attention_heads
    kinds = [config.layer_kind(layer) for layer in range(config.num_layers)]
    return values | {
        "num_kv_heads": None if config.kv_heads == heads else config.kv_heads,
        "attention_head_dim": (
            None if heads * config.head_dim == config.hidden_size else config.head_dim
        ),
        "qkv_bias": (None if config.has_qkv_bias == config.attention_bias else config.has_qkv_bias),
        "sliding_window": config.sliding_window if "sliding" in kinds else None,
        "attention_config": None if uniform(kinds) else kinds,
        "rmsnorm_partial": None if config.rmsnorm_partial == 1 else config.rmsnorm_partial,
        "activation": "silu" if config.activation == "swish" else config.activation,
    }


def uniform(kinds: Collection[str]) -> bool:
    """Whether all layers attend alike, over the whole row or a sliding window."""
    return set(kinds) in ({"global"}, {"sliding"})


def unexpressed(config: TransformerConfig, table: Mapping[str, Values]) -> Iterator[str]:
    """Every option in effect that `table` lacks, as NAME=VALUE."""
    for name, value in effective(config).items():
        if name in table:
            values = table[name]
            lacking = values is not None and value not in values
        else:
            field = TransformerConfig.model_fields.get(name, type(config).model_fields[name])
            lacking = value != field.get_default(call_default_factory=True)
        if lacking:
            # A section is named alone; its format, if there is one, names the option inside.
            yield name if isinstance(value, Config) else f"{name}={shown(value)}"
