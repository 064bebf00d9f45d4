"""Hugging Face folders of GPTNeoXForCausalLM: the key map, config.json both ways, safetensors both ways.

The files load in transformers 4.57 and 5: `rotary_pct`, `rotary_emb_base` and `torch_dtype` are read by 4,
`rope_parameters` by 5. The output head is stored as `embed_out.weight`, as in the published Pythia models; 4 knows it
by that name and 5 renames it.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule
from castalia.checkpoint.tensors import FileTensor, StoredTensors, tensors_of_file
from castalia.config.base import build
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import write_json
from castalia.models.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All five compute 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
"""transformers' names of activations, and ours."""

OLD_BUFFERS = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"gpt_neox\.rotary_emb\.inv_freq",
)
"""Tables that older checkpoints carry; both libraries compute them."""

PARTS = {
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
"""Modules of one layer. Both sides order the rows of QKV as GPT-NeoX does, so every tensor is a plain copy."""


def hf_keymap(config: ModelConfig) -> KeyMap:
    """Our names and GPTNeoXForCausalLM's for a model of `config`.

    Source  Names: transformers, models/gpt_neox/modeling_gpt_neox.py.
    """
    rules = [
        Rule("embed.weight", "gpt_neox.embed_in.weight"),
        Rule("norm.weight", "gpt_neox.final_layer_norm.weight"),
        Rule("norm.bias", "gpt_neox.final_layer_norm.bias"),
    ]
    for ours, theirs in PARTS.items():
        biased = {"attn": config.attention_bias, "mlp": config.mlp_bias}.get(
            ours.split(".")[0], True
        )
        for kind in ("weight", "bias") if biased else ("weight",):
            rules.append(
                Rule(f"layers.{{i}}.{ours}.{kind}", f"gpt_neox.layers.{{i}}.{theirs}.{kind}")
            )
    ignored = list(OLD_BUFFERS)
    if config.tie_word_embeddings:
        ignored += [r"embed_out\.weight", r"lm_head\.weight"]
    else:
        rules.append(Rule("unembed.weight", "embed_out.weight", aliases=("lm_head.weight",)))
    return KeyMap("Hugging Face GPTNeoX", rules, layers=config.num_layers, ignored=ignored)


def hf_config(config: ModelConfig, *, eod_id: int | None, dtype: str = "fp32") -> dict[str, Any]:
    """The config.json that makes transformers compute what our model computes.

    Raises  ConfigError naming the option that GPTNeoXForCausalLM cannot express.
    """
    require_expressible(config)
    rope = {
        "rope_type": "default",
        "rope_theta": config.rotary_emb_base,
        "partial_rotary_factor": config.rotary_pct,
    }
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "gelu",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
        "rope_parameters": rope,
        "use_parallel_residual": config.parallel_residual,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "layer_norm_eps": config.layernorm_epsilon,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": config.init_method_std,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "use_cache": True,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def require_expressible(config: ModelConfig) -> None:
    """Raises  ConfigError if GPTNeoXForCausalLM has no such model."""
    if not config.mlp_bias:
        raise ConfigError(
            "a Hugging Face GPTNeoX model cannot express mlp_bias=false: its MLP always has biases; export --to ct2"
        )


def model_config(
    values: Mapping[str, Any], where: str, vocab_size: int | None = None
) -> ModelConfig:
    """Our config for a config.json of transformers. `vocab_size` is the tokenizer's, the file has the padded one.

    Raises  ConfigError if the model is of another family or uses an option that our decoder lacks.
    """
    if values.get("model_type") != "gpt_neox":
        raise ConfigError(
            f"{where}: model_type is {values.get('model_type')!r}; only 'gpt_neox' can be read"
        )
    if (activation := values.get("hidden_act", "gelu")) not in ACTIVATIONS:
        raise ConfigError(
            f"{where}: hidden_act {activation!r} is unknown; have: {', '.join(ACTIVATIONS)}"
        )
    rotary_pct, rotary_base = rotary(values, where)
    padded = require_int(values, "vocab_size", where)
    if vocab_size is not None and vocab_size > padded:
        raise ConfigError(
            f"{where}: the tokenizer has {vocab_size} ids but the embedding only {padded} rows"
        )
    real = vocab_size or padded
    return build(
        ModelConfig,
        {
            "num_layers": require_int(values, "num_hidden_layers", where),
            "hidden_size": require_int(values, "hidden_size", where),
            "num_attention_heads": require_int(values, "num_attention_heads", where),
            "intermediate_size": values.get("intermediate_size"),
            "vocab_size": real,
            "make_vocab_size_divisible_by": 128 if -(-real // 128) * 128 == padded else padded,
            "max_position_embeddings": values.get("max_position_embeddings", 2048),
            "rotary_pct": rotary_pct,
            "rotary_emb_base": rotary_base,
            "parallel_residual": values.get("use_parallel_residual", True),
            "tie_word_embeddings": values.get("tie_word_embeddings", False),
            "activation": ACTIVATIONS[activation],
            "attention_bias": values.get("attention_bias", True),
            "layernorm_epsilon": values.get("layer_norm_eps", 1e-5),
        },
        where,
    )


def rotary(values: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Rotary share and base: from `rope_parameters` (transformers 5), else from the older keys.

    Raises  ConfigError if the frequencies are scaled.
    """
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope_type {kind!r} cannot be read; only 'default'")
    share = rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25))
    base = rope.get("rope_theta", values.get("rotary_emb_base", 10000.0))
    return float(share), float(base)


def require_int(values: Mapping[str, Any], key: str, where: str) -> int:
    """Raises  ConfigError if the key is missing."""
    if key not in values:
        raise ConfigError(f"{where}: {key} is missing")
    return int(values[key])


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` holds a config.json of transformers."""
    return (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises  CheckpointError if the file is not that.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"cannot read {path}: expected a JSON object, got {type(value).__name__}"
        )
    return value


def read_hf(
    folder: Path, vocab_size: int | None = None, optional: Collection[str] = ()
) -> tuple[StoredTensors, ModelConfig]:
    """Weights under our names, in the file's dtype and read when asked for, and our config. Never reads a pickle.

    `optional` are patterns of our names that the files may lack.
    Raises  CheckpointError if files are missing or broken or the keys do not fit; ConfigError for another architecture.
    """
    config = model_config(
        read_json(folder / "config.json"), str(folder / "config.json"), vocab_size
    )
    theirs: dict[str, FileTensor] = {}
    for path in weight_files(folder):
        theirs |= tensors_of_file(path)
    rules = hf_keymap(config).rules_for(theirs, optional)
    ours = {
        rule.ours: replace(theirs[key], transform=rule.transform) for key, rule in rules.items()
    }
    return StoredTensors(ours), config


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names.

    Raises  CheckpointError if there is neither, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = (
        set(read_json(index).get("weight_map", {}).values())
        if index.is_file()
        else {"model.safetensors"}
    )
    files = [folder / str(name) for name in sorted(names)]
    for file in files:
        if file.parent != folder or not file.is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise CheckpointError(
                f"{folder} has no {file.name}; have: {found}. Only safetensors weights are read"
            )
    return files


def write_hf(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    eod_id: int | None,
    dtype: str = "fp32",
) -> None:
    """Write config.json, generation_config.json and model.safetensors into `folder`, which exists.

    `dtype` of the stored weights: fp32, bf16 or fp16.
    Raises  ConfigError if GPTNeoXForCausalLM cannot express the model; CheckpointError if the keys do not fit.
    """
    write_json(folder / "config.json", hf_config(config, eod_id=eod_id, dtype=dtype))
    write_json(folder / "generation_config.json", {"bos_token_id": eod_id, "eos_token_id": eod_id})
    theirs = hf_keymap(config).to_theirs(tensors)
    stored = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in theirs.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def write_hf_tokenizer(folder: Path, *, eod_token: str | None, max_length: int) -> None:
    """The two small files that AutoTokenizer wants beside tokenizer.json. `max_length` is the model's, in tokens.

    The class is the plain fast tokenizer, which runs tokenizer.json as it is; GPTNeoXTokenizer rebuilds parts of it.
    """
    special = (
        {}
        if eod_token is None
        else dict.fromkeys(("bos_token", "eos_token", "unk_token"), eod_token)
    )
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
