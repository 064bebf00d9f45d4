"""The shape of a model as `model.bin` of CTranslate2 has it: scalars beside the weights.

Where two spellings mean the same, the one that the library's own converter writes for the family is
chosen, so that both files are equal.
Source  CTranslate2 4.8, python/ctranslate2/specs/transformer_spec.py and attention_spec.py,
        converters/transformers.py; src/layers/attention_layer.cc for what the engine does with it.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from castalia.models.config import TransformerConfig
from castalia.models.parts.frequencies import frequencies, inverse_frequencies, stretched
from castalia.models.scaling import RopeScaling
from castalia.models.windows import window

Numbers = dict[str, NDArray[np.generic]]

ACTIVATIONS = {
    "relu": 0,
    "reglu": 0,
    "gelu_tanh": 1,
    "geglu_tanh": 1,
    "swish": 2,
    "silu": 2,
    "swiglu": 2,
    "gelu": 3,
    "geglu": 3,
    "glu": 6,
}
"""Numbers of CTranslate2's Activation: of a gated MLP, the function of the gate."""
LINEAR = 0
SU = 1
LLAMA3 = 2
"""Numbers of its RotaryScalingType."""


def decoder_scalars(config: TransformerConfig) -> Numbers:
    """All scalars, of the types that the library expects."""
    falcon = config.family == "falcon"
    alibi = config.pos_emb == "alibi"
    numbers: Numbers = {
        "decoder/activation": np.asarray(np.int8(ACTIVATIONS[config.activation])),
        "decoder/alignment_heads": np.asarray(np.int16(1)),
        "decoder/alignment_layer": np.asarray(np.int16(-1)),
        "decoder/num_heads": np.asarray(np.int16(config.num_attention_heads)),
        "decoder/pre_norm": flag(True),
        "decoder/alibi": flag(alibi),
        # From the first key or the last: a constant for each query, which the softmax drops.
        "decoder/alibi_use_positive_positions": flag(falcon),
        "decoder/scale_alibi": flag(config.alibi_scaled if alibi else falcon),
        "decoder/start_from_zero_embedding": flag(False),
        # Without it the engine multiplies embeddings by the root of the width.
        "decoder/scale_embeddings": flag(False),
    }
    if config.embedding_multiplier != 1:
        numbers["decoder/scale_embeddings"] = real(config.embedding_multiplier)
    if config.output_multiplier != 1:
        numbers["decoder/scale_outputs"] = real(config.output_multiplier)
    width = window(config)
    if width is not None:
        numbers["decoder/sliding_window"] = integer(width)
    attention = attention_scalars(config)
    for layer in range(config.num_layers):
        for name, value in attention.items():
            numbers[f"decoder/layer_{layer}/self_attention/{name}"] = value
    return numbers


def attention_scalars(config: TransformerConfig) -> Numbers:
    """Those of every attention layer."""
    numbers: Numbers = {}
    if config.kv_heads != config.num_attention_heads or config.family == "falcon":
        numbers["num_heads_kv"] = integer(config.kv_heads)
    square = config.head_dim * config.num_attention_heads == config.hidden_size
    if not square or config.family == "mistral" or config.qk_norm == "head":
        numbers["head_dim"] = integer(config.head_dim)
    width = window(config)
    if width is not None:
        numbers["sliding_window"] = integer(width)
    if config.pos_emb == "rotary":
        numbers |= rotary_scalars(config)
    return numbers


def rotary_scalars(config: TransformerConfig) -> Numbers:
    """Rotary embedding, scaled or not."""
    whole = config.rotary_dim == config.head_dim
    # 0 means the whole head, and the converter writes it but for two families.
    named = config.family == "neox" or config.qk_norm == "head" or not whole
    numbers = {
        "rotary_base": real(config.rotary_emb_base),
        "rotary_dim": integer(config.rotary_dim if named else 0),
        "rotary_interleave": flag(False),
    }
    scaling = config.rope_scaling
    if scaling is None:
        return numbers
    if scaling.kind == "ntk":
        base = stretched(config.rotary_emb_base, config.rotary_dim, scaling.factor)
        return numbers | {"rotary_base": real(base)}
    if scaling.kind == "yarn":
        return numbers | yarn_scalars(config)
    return numbers | scaling_scalars(scaling, config.max_position_embeddings)


def scaling_scalars(scaling: RopeScaling, longest: int) -> Numbers:
    """The kinds of scaling that the library computes itself."""
    numbers = {"rotary_scaling_factor": real(scaling.factor)}
    if scaling.kind == "linear":
        return numbers | {"rotary_scaling_type": small(LINEAR)}
    trained = scaling.original_max_position_embeddings or longest
    # The library's converter omits the factor and the length; its Llama 3.1 has other logits.
    return numbers | {
        "rotary_scaling_type": small(LLAMA3),
        "rotary_low_freq_factor": real(scaling.low_freq_factor),
        "rotary_high_freq_factor": real(scaling.high_freq_factor),
        "original_max_position_embeddings": integer(trained),
    }


def yarn_scalars(config: TransformerConfig) -> Numbers:
    """YaRN, which the library does not know, as its scaling by any factor of each frequency.

    The factor of cosines and sines enters every score twice, as the scale of the queries does once.
    """
    device = torch.device("cpu")
    plain = inverse_frequencies(config.rotary_emb_base, config.rotary_dim, device)
    scaled, factor = frequencies(config, 0, device)
    factors = np.asarray((plain / scaled).numpy(), np.float32)
    numbers: Numbers = {
        "rotary_scaling_type": small(SU),
        "rotary_scaling_long_factor": factors,
        "rotary_scaling_short_factor": factors,
    }
    if factor != 1:
        numbers["queries_scale"] = real(factor**2 / math.sqrt(config.head_dim))
    return numbers


def flag(value: bool) -> NDArray[np.generic]:
    """A boolean as the file has it."""
    return small(int(value))


def small(value: int) -> NDArray[np.generic]:
    """An int8."""
    return np.asarray(np.int8(value))


def integer(value: int) -> NDArray[np.generic]:
    """An int32."""
    return np.asarray(np.int32(value))


def real(value: float) -> NDArray[np.generic]:
    """A float32."""
    return np.asarray(np.float32(value))
