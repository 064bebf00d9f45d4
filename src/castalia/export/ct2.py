"""CTranslate2: a model folder written straight from the weights.

Writing needs neither transformers nor ctranslate2.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule
from castalia.checkpoint.special_ids import SpecialIds
from castalia.core.errors import ConfigError
from castalia.data.tokenizer import Tokenizer
from castalia.export.ct2_file import write_model_bin
from castalia.export.part_rules import linear_rules, norm_rules, parts_of
from castalia.models.config import ModelConfig, TransformerConfig, require_transformer

LINEARS = {
    "qkv": "self_attention/linear_0",
    "attention_out": "self_attention/linear_1",
    "mlp_up": "ffn/linear_0",
    "mlp_down": "ffn/linear_1",
}
PARALLEL_NORMS = {
    "attention_norm": "input_layer_norm",
    "mlp_norm": "post_attention_layer_norm",
}
SERIAL_NORMS = {"attention_norm": "self_attention/layer_norm", "mlp_norm": "ffn/layer_norm"}
NORM_KINDS = ("/gamma", "/beta")


def ct2_keymap(config: TransformerConfig) -> KeyMap:
    """Our names and the paths inside TransformerDecoderModelSpec.

    Source  CTranslate2 4.8, python/ctranslate2/specs/transformer_spec.py and attention_spec.py.
    Raises  ConfigError if the specification has no place for a part of the family's blocks.
    """
    norms = PARALLEL_NORMS if config.parallel_residual else SERIAL_NORMS
    parts = parts_of(config, LINEARS | norms, "CTranslate2")
    rules = [Rule("embed.weight", "decoder/embeddings/weight")]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "decoder/projection/weight"))
    rules += norm_rules("norm", "decoder/layer_norm", NORM_KINDS)
    for norm in parts.norms:
        place = f"decoder/layer_{{i}}/{norms[norm.role]}"
        rules += norm_rules(f"layers.{{i}}.{norm.place}", place, NORM_KINDS)
    rules += linear_rules(parts, LINEARS, "decoder/layer_{{i}}/{name}/{kind}")
    return KeyMap("CTranslate2", rules, layers=config.num_layers)


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
    theirs = dict(ct2_keymap(config).to_theirs(tensors))
    if config.tie_word_embeddings:
        theirs["decoder/projection/weight"] = theirs["decoder/embeddings/weight"]
    vocabulary = ct2_vocabulary(tokenizer.tokens(), config.padded_vocab_size)
    write_model_bin(folder / "model.bin", theirs, config, quantization)
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
        # The official serializer writes this for every decoder without grouped queries.
        "multi_query_attention": True,
        "unk_token": end,
    }
    (folder / "config.json").write_text(
        json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, indent=2), encoding="utf-8")
