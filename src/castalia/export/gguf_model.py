"""A model as llama.cpp's graphs read it: tensors under their names, and the keys of its shape.

Source  llama.cpp, gguf-py/gguf/constants.py (names), src/llama-model.cpp (what is read).
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule, Transform
from castalia.export.gguf_values import ARRAY, BOOL, FLOAT32, STRING, UINT32, Metadata
from castalia.export.part_rules import (
    added_positions,
    linear_rules,
    norm_rules,
    parts_of,
    plain_norms,
    row_order,
)
from castalia.inference.gguf_architectures import SHARED_GATE, Architecture, architecture_of
from castalia.models.config import TransformerConfig, require_transformer
from castalia.models.families import build_model_config
from castalia.models.families.base import LinearPart
from castalia.models.parts.frequencies import (
    frequencies,
    inverse_frequencies,
    stretched,
    yarn_factor,
)
from castalia.models.parts.qkv import heads_apart
from castalia.models.scaling import RopeScaling
from castalia.models.windows import window

NORM_KINDS = {"weight": ".weight", "bias": ".bias"}
POSITIONS = "position_embd.weight"
"""The table of added positions, which llama.cpp's own converter stores in F32."""


def gguf_tensors(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Every tensor under llama.cpp's name, with those that it requires and our model lacks."""
    architecture = architecture_of(config)
    own = dict(tensors)
    table = added_positions(config, own)
    own.pop("positions.weight", None)
    theirs = gguf_keymap(config).to_theirs(own)
    theirs |= plain_norms(config, norm_places(config, architecture), NORM_KINDS)
    if table is not None:
        theirs[POSITIONS] = table
    if architecture.name == "gptneox" and config.shared_norm:
        theirs |= second_norms(theirs)
    if architecture.every_bias:
        theirs |= missing_biases(theirs, config)
    if architecture.frequency_factors and scaled_by_table(config):
        theirs["rope_freqs.weight"] = frequency_factors(config)
    multiply(theirs, config, architecture)
    # llama.cpp maps the file: the tensors of a layer stand together, layer after layer.
    return {name: theirs[name] for name in sorted(theirs, key=layer_of)}


def with_heads_apart(
    config: TransformerConfig, tensors: Mapping[str, Tensor]
) -> tuple[TransformerConfig, Mapping[str, Tensor]]:
    """The same model with queries, keys and values apart, if its architecture wants them so."""
    if not config.fused_qkv or "qkv" in architecture_of(config).names:
        return config, tensors
    values = config.without_start().model_dump(mode="json") | {"family": "llama"}
    apart = require_transformer(build_model_config(values, "the model"), "llama.cpp")
    own = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." not in name:
            own[name] = tensor
            continue
        rows = heads_apart(tensor, config.num_attention_heads).chunk(3)
        for letter, part in zip("qkv", rows, strict=True):
            own[name.replace(".attn.qkv.", f".attn.{letter}.")] = part
    return apart, own


def gguf_keymap(config: TransformerConfig) -> KeyMap:
    """Our names and llama.cpp's, but for positions.

    Raises  ConfigError if llama.cpp has no place for a part of the family's blocks.
    """
    architecture = architecture_of(config)
    norms = norm_places(config, architecture)
    parts = parts_of(config, {**architecture.names, **norms}, "llama.cpp")
    rules = [Rule("embed.weight", "token_embd.weight")]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "output.weight"))
    for norm in (*parts.norms, parts.final_norm):
        rules += norm_rules(norm, norms[norm.role], NORM_KINDS)
    pattern = "blk.{{i}}.{name}.{kind}"
    if architecture.adjacent_pairs:
        rules += linear_rules(parts, architecture.names, pattern, pairs_adjacent(config))
    else:
        rules += linear_rules(parts, architecture.names, pattern)
    rules += expert_rules(config, architecture)
    return KeyMap("GGUF", rules, layers=config.num_layers)


def expert_rules(config: TransformerConfig, architecture: Architecture) -> Iterator[Rule]:
    """The rules of a block's experts, which both sides hold in one tensor for each matrix."""
    if config.moe is None:
        return
    assert architecture.mixture is not None, "refusal was not asked"
    for ours, name in architecture.mixture.names.items():
        how = Transform(lambda row: row[0], lambda row: row[None])
        if name != SHARED_GATE:
            how = Transform()
        yield Rule(f"layers.{{i}}.mlp.{ours}", f"blk.{{i}}.{name}.weight", how)


def norm_places(config: TransformerConfig, architecture: Architecture) -> dict[str, str]:
    """Where llama.cpp has each norm, by its role."""
    names = dict(architecture.names)
    if architecture.name == "falcon" and not config.shared_norm:
        # Falcon 40B: the second norm is that of the attention, the first that of the MLP.
        names |= {"attention_norm": "attn_norm_2", "mlp_norm": "attn_norm"}
    roles = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
    places = {role: f"blk.{{i}}.{names[role]}" for role in roles}
    return places | {"final_norm": "output_norm"}


def pairs_adjacent(config: TransformerConfig) -> Callable[[LinearPart], Transform]:
    """The order of rows for a rotation of dimensions 2j and 2j + 1, of queries and keys alone."""
    half = config.head_dim // 2

    def adjacent(tensor: Tensor) -> Tensor:
        heads = tensor.reshape(-1, 2, half, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def apart(tensor: Tensor) -> Tensor:
        heads = tensor.reshape(-1, half, 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def order(part: LinearPart) -> Transform:
        if part.role in ("q", "k"):
            return Transform(adjacent, apart)
        return row_order(part)

    return order


def second_norms(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The MLP's norm of blocks that have one norm for both parts."""
    return {
        name.replace(".attn_norm.", ".ffn_norm."): tensor
        for name, tensor in theirs.items()
        if ".attn_norm." in name
    }


def missing_biases(theirs: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Zeros for the biases that the model lacks and llama.cpp requires."""
    made = {}
    for layer in range(config.num_layers):
        for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            place = f"blk.{layer}.{part}"
            if f"{place}.bias" not in theirs:
                weight = theirs[f"{place}.weight"]
                made[f"{place}.bias"] = weight.new_zeros(len(weight))
    return made


def multiply(
    theirs: dict[str, Tensor], config: TransformerConfig, architecture: Architecture
) -> None:
    """Fold the multipliers into embedding and head, and give a tied model the head it needs."""
    before = config.embedding_multiplier
    after = config.output_multiplier
    embedding = theirs["token_embd.weight"]
    if architecture.head or before != after:
        theirs.setdefault("output.weight", embedding)
    if before != 1:
        theirs["token_embd.weight"] = embedding * before
    if after != 1 and "output.weight" in theirs:
        theirs["output.weight"] = theirs["output.weight"] * after


def layer_of(name: str) -> int:
    """Number of the layer that a tensor belongs to, -1 outside the layers."""
    if name.startswith("blk."):
        return int(name.split(".")[1])
    return -1


def shape_values(config: TransformerConfig) -> Metadata:
    """The model's shape under the keys of its architecture."""
    architecture = architecture_of(config)
    epsilon = "layer_norm_epsilon"
    if config.norm == "rmsnorm":
        epsilon = "layer_norm_rms_epsilon"
    values: Metadata = {
        "context_length": (UINT32, config.max_position_embeddings),
        "vocab_size": (UINT32, config.padded_vocab_size),
        "embedding_length": (UINT32, config.hidden_size),
        "block_count": (UINT32, config.num_layers),
        "feed_forward_length": (UINT32, config.ffn_size),
        "attention.head_count": (UINT32, config.num_attention_heads),
        "attention.head_count_kv": (UINT32, config.kv_heads),
        "attention.key_length": (UINT32, config.head_dim),
        "attention.value_length": (UINT32, config.head_dim),
        f"attention.{epsilon}": (FLOAT32, config.layernorm_epsilon),
    }
    if architecture.name in ("gptneox", "stablelm"):
        values["use_parallel_residual"] = (BOOL, config.parallel_residual)
    if config.pos_emb == "alibi":
        # 2^-8 is the slope of the last head, Press et al. 2021.
        values["attention.max_alibi_bias"] = (FLOAT32, 8.0)
    if config.pos_emb == "rotary":
        values |= rotary_values(config, architecture)
    values |= expert_values(config)
    width = window(config)
    if width is not None:
        sliding = [config.layer_kind(i) == "sliding" for i in range(config.num_layers)]
        values["attention.sliding_window"] = (UINT32, width)
        values["attention.sliding_window_pattern"] = (ARRAY, (BOOL, sliding))
    named: Metadata = {"general.architecture": (STRING, architecture.name)}
    return named | {f"{architecture.name}.{key}": value for key, value in values.items()}


def expert_values(config: TransformerConfig) -> Metadata:
    """Keys of experts; those of Mixtral and OLMoE have the width of the MLP."""
    moe = config.moe
    if moe is None:
        return {}
    values: Metadata = {
        "expert_count": (UINT32, moe.experts),
        "expert_used_count": (UINT32, moe.top_k),
        "expert_feed_forward_length": (UINT32, config.expert_size),
        "feed_forward_length": (UINT32, config.expert_size),
    }
    if moe.shared_size:
        values["expert_shared_feed_forward_length"] = (UINT32, moe.shared_size)
    return values


def rotary_values(config: TransformerConfig, architecture: Architecture) -> Metadata:
    """Keys of rotary embedding, scaled or not."""
    base = config.rotary_emb_base
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "ntk":
        base = stretched(base, config.rotary_dim, scaling.factor)
    values: Metadata = {
        "rope.dimension_count": (UINT32, config.rotary_dim),
        "rope.freq_base": (FLOAT32, base),
    }
    if scaling is None or scaling.kind == "ntk":
        return values
    if scaling.kind == "linear":
        return values | {
            "rope.scaling.type": (STRING, "linear"),
            "rope.scaling.factor": (FLOAT32, scaling.factor),
        }
    if architecture.frequency_factors:
        factor = 1.0
        if scaling.kind == "yarn":
            factor = yarn_factor(scaling)
        return values | {"rope.scaling.attn_factor": (FLOAT32, factor)}
    return values | yarn_values(scaling, config.max_position_embeddings)


def yarn_values(scaling: RopeScaling, longest: int) -> Metadata:
    """YaRN as llama.cpp computes it: cosines and sines times attn_factor (1 + 0.1 ln factor)."""
    trained = scaling.original_max_position_embeddings or longest
    factor = yarn_factor(scaling) / (1.0 + 0.1 * math.log(scaling.factor))
    return {
        "rope.scaling.type": (STRING, "yarn"),
        "rope.scaling.factor": (FLOAT32, scaling.factor),
        "rope.scaling.original_context_length": (UINT32, trained),
        "rope.scaling.attn_factor": (FLOAT32, factor),
    }


def scaled_by_table(config: TransformerConfig) -> bool:
    """Whether frequencies are scaled in a way that llama.cpp reads as a table."""
    scaling = config.rope_scaling
    return scaling is not None and scaling.kind in ("yarn", "llama3")


def frequency_factors(config: TransformerConfig) -> Tensor:
    """What llama.cpp divides each rotary frequency by, float32 (R / 2,)."""
    device = torch.device("cpu")
    scaled, _ = frequencies(config, 0, device)
    return inverse_frequencies(config.rotary_emb_base, config.rotary_dim, device) / scaled
