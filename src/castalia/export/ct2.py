"""CTranslate2: a model folder written straight from the weights.

Writing needs neither transformers nor ctranslate2.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule
from castalia.core.errors import ConfigError
from castalia.export.ct2_file import write_model_bin
from castalia.export.ct2_scalars import decoder_scalars
from castalia.export.part_rules import (
    added_positions,
    linear_rules,
    norm_rules,
    parts_of,
    plain_norms,
)
from castalia.models.config import TransformerConfig, require_transformer
from castalia.models.model_config import ModelConfig
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.tokenizer import Tokenizer

LINEARS = {
    "qkv": "self_attention/linear_0",
    "q": "self_attention/linear_0",
    "k": "self_attention/linear_0",
    "v": "self_attention/linear_0",
    "attention_out": "self_attention/linear_1",
    "mlp_up": "ffn/linear_0",
    "mlp_down": "ffn/linear_1",
}
GATED_LINEARS = LINEARS | {"mlp_gate": "ffn/linear_0", "mlp_up": "ffn/linear_0_noact"}
HEAD_NORMS = {"q_norm": "self_attention/q_norm", "k_norm": "self_attention/k_norm"}
PARALLEL_NORMS = HEAD_NORMS | {
    "attention_norm": "input_layer_norm",
    "mlp_norm": "post_attention_layer_norm",
}
SHARED_NORMS = HEAD_NORMS | {"attention_norm": "shared_layer_norm"}
SERIAL_NORMS = HEAD_NORMS | {
    "attention_norm": "self_attention/layer_norm",
    "mlp_norm": "ffn/layer_norm",
}
NORM_KINDS = {"weight": "/gamma", "bias": "/beta"}


def ct2_keymap(config: TransformerConfig) -> KeyMap:
    """Our names and the paths inside TransformerDecoderModelSpec, but for positions.

    Source  CTranslate2 4.8, python/ctranslate2/specs/transformer_spec.py and attention_spec.py.
    Raises  ConfigError if the specification has no place for a part of the family's blocks.
    """
    norms = norm_places(config)
    linears = LINEARS
    if config.gated:
        linears = GATED_LINEARS
    parts = parts_of(config, linears | norms, "CTranslate2")
    rules = [Rule("embed.weight", "decoder/embeddings/weight")]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "decoder/projection/weight"))
    for norm in (*parts.norms, parts.final_norm):
        rules += norm_rules(norm, norms[norm.role], NORM_KINDS)
    rules += linear_rules(parts, linears, "decoder/layer_{{i}}/{name}/{kind}")
    return KeyMap("CTranslate2", rules, layers=config.num_layers)


def norm_places(config: TransformerConfig) -> dict[str, str]:
    """Where the specification has each norm, by its role."""
    if not config.parallel_residual:
        norms = SERIAL_NORMS
    elif config.shared_norm:
        norms = SHARED_NORMS
    else:
        norms = PARALLEL_NORMS
    places = {role: f"decoder/layer_{{i}}/{name}" for role, name in norms.items()}
    return places | {"final_norm": "decoder/layer_norm"}


def ct2_tensors(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """All tensors of the file."""
    own = dict(tensors)
    table = added_positions(config, own)
    own.pop("positions.weight", None)
    theirs = ct2_keymap(config).to_theirs(own)
    theirs |= plain_norms(config, norm_places(config), NORM_KINDS)
    if table is not None:
        theirs["decoder/position_encodings/encodings"] = table
    if config.tie_word_embeddings:
        theirs["decoder/projection/weight"] = theirs["decoder/embeddings/weight"]
    return theirs


def ct2_vocabulary(tokens: Sequence[str], rows: int) -> list[str]:
    """A name for each row of the embedding, in the order of the ids; padding is <extra_id_N>.

    Raises  ConfigError if the tokenizer has more tokens than the model, or one twice.
    """
    if len(tokens) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokens)} tokens but the model's vocabulary {rows}"
        )
    if len(set(tokens)) != len(tokens):
        raise ConfigError("the tokenizer has a token twice; CTranslate2 finds tokens by their text")
    return [*tokens, *(f"<extra_id_{i}>" for i in range(rows - len(tokens)))]


def write_ct2(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    special: SpecialIds,
    *,
    quantization: str,
) -> None:
    """Write model.bin, config.json and vocabulary.json into `folder`, which exists.

    Raises  ConfigError if CTranslate2 cannot express the vocabulary; CheckpointError if keys do
            not fit.
    """
    config = require_transformer(config, "CTranslate2")
    if not special.end_ids:
        raise ConfigError("CTranslate2 needs a token that ends a text, and this model names none")
    theirs = ct2_tensors(tensors, config)
    vocabulary = ct2_vocabulary(tokenizer.tokens(), config.padded_vocab_size)
    write_model_bin(folder / "model.bin", theirs, decoder_scalars(config), quantization)
    # The library knows one end; an engine that knows more passes them with every call.
    end = vocabulary[special.end_ids[0]]
    start = end
    if special.start_id is not None:
        start = vocabulary[special.start_id]
    # unk_token: without a name from the vocabulary, the engine appends its own unknown token, an
    # id beyond the embedding. layer_norm_epsilon: the engine's default is 1e-5.
    described: dict[str, str | float | bool] = {
        "bos_token": start,
        "eos_token": end,
        "layer_norm_epsilon": config.layernorm_epsilon,
        # The official serializer writes this for all but Falcon without shared keys.
        "multi_query_attention": config.family != "falcon"
        or config.kv_heads != config.num_attention_heads,
        "unk_token": end,
    }
    (folder / "config.json").write_text(
        json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, indent=2), encoding="utf-8")
