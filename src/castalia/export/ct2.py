"""CTranslate2: a model folder written straight from our weights.

Neither transformers nor ctranslate2 is needed to write one.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule, Transform
from castalia.core.errors import ConfigError, nearest
from castalia.data.tokenizer import Tokenizer
from castalia.export.ct2_file import QUANTIZATIONS, write_model_bin
from castalia.models.config import ModelConfig, TransformerConfig, require_transformer
from castalia.models.parts.qkv import heads_apart, heads_together


def ct2_keymap(config: TransformerConfig) -> KeyMap:
    """Our names and the paths inside TransformerDecoderModelSpec.

    Source  CTranslate2 4.8, python/ctranslate2/specs/transformer_spec.py and attention_spec.py.
    """
    qkv = Transform(
        partial(heads_apart, heads=config.num_attention_heads),
        partial(heads_together, heads=config.num_attention_heads),
    )
    layer = "decoder/layer_{i}"
    rules = [Rule("embed.weight", "decoder/embeddings/weight")]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "decoder/projection/weight"))
    rules += norm_rules("norm", "decoder/layer_norm")
    if config.parallel_residual:
        rules += norm_rules("layers.{i}.norm1", f"{layer}/input_layer_norm")
        rules += norm_rules("layers.{i}.norm2", f"{layer}/post_attention_layer_norm")
    else:
        rules += norm_rules("layers.{i}.norm1", f"{layer}/self_attention/layer_norm")
        rules += norm_rules("layers.{i}.norm2", f"{layer}/ffn/layer_norm")
    for ours, theirs, biased, transform in (
        ("attn.qkv", "self_attention/linear_0", config.attention_bias, qkv),
        ("attn.out", "self_attention/linear_1", config.attention_bias, Transform()),
        ("mlp.up", "ffn/linear_0", config.mlp_bias, Transform()),
        ("mlp.down", "ffn/linear_1", config.mlp_bias, Transform()),
    ):
        for kind in ("weight", "bias") if biased else ("weight",):
            rules.append(Rule(f"layers.{{i}}.{ours}.{kind}", f"{layer}/{theirs}/{kind}", transform))
    return KeyMap("CTranslate2", rules, layers=config.num_layers)


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    """The two rules of a LayerNorm."""
    return [Rule(f"{ours}.weight", f"{theirs}/gamma"), Rule(f"{ours}.bias", f"{theirs}/beta")]


def ct2_vocabulary(tokens: Sequence[str], rows: int) -> list[str]:
    """A name for each of the embedding's rows, in the order of the ids; rows of no token are called <extra_id_N>.

    Raises  ConfigError if the tokenizer has more tokens than the model, or one twice.
    """
    if len(tokens) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokens)} tokens but the model's vocabulary {rows}"
        )
    if len(set(tokens)) != len(tokens):
        raise ConfigError("the tokenizer has a token twice; CTranslate2 finds tokens by their text")
    return [*tokens, *(f"<extra_id_{i}>" for i in range(rows - len(tokens)))]


def require_quantization(name: str) -> None:
    """Raises  ConfigError listing the known ones."""
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"no quantization {name!r}; have: {', '.join(QUANTIZATIONS)}{nearest(name, QUANTIZATIONS)}"
        )


def write_ct2(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    quantization: str,
) -> None:
    """Write model.bin, config.json and vocabulary.json into `folder`, which exists.

    Raises  ConfigError if CTranslate2 cannot express the model or the vocabulary; CheckpointError if keys do not fit.
    """
    require_quantization(quantization)
    config = require_transformer(config, "CTranslate2")
    if tokenizer.eod_id is None:
        raise ConfigError("CTranslate2 needs an end-of-document token, and this tokenizer has none")
    theirs = dict(ct2_keymap(config).to_theirs(tensors))
    if config.tie_word_embeddings:
        theirs["decoder/projection/weight"] = theirs["decoder/embeddings/weight"]
    vocabulary = ct2_vocabulary(tokenizer.tokens(), config.padded_vocab_size)
    write_model_bin(folder / "model.bin", theirs, config, quantization)
    end = vocabulary[tokenizer.eod_id]
    # Without a name that is in the vocabulary the engine appends its own unknown token, an id beyond the embedding;
    # with the epsilon left out it takes 1e-5 whatever the model was trained with.
    described: dict[str, str | float | bool] = {
        "bos_token": end,
        "eos_token": end,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "multi_query_attention": True,  # what its own serializer says of every decoder without grouped queries
        "unk_token": end,
    }
    (folder / "config.json").write_text(
        json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, indent=2), encoding="utf-8")
