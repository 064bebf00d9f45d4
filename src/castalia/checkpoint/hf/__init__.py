"""Hugging Face folders: config.json both ways, safetensors both ways, by family.

Reading chooses the family by `model_type` of config.json, writing by `model.family`. A family of
another package registers an `HfFormat` under its name. The files load in transformers 4.57 and 5.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.hf.format import HfFormat
from castalia.checkpoint.hf.neox import NeoxFormat
from castalia.checkpoint.keymap import KeyMap
from castalia.checkpoint.tensors import FileTensor, StoredTensors, save_tensors, tensors_of_file
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.files import write_json
from castalia.core.registry import Registry
from castalia.models.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HF: Registry[HfFormat] = Registry("Hugging Face family")
"""The format of each family that transformers has, by the name of our family."""
HF.register("neox")(NeoxFormat())


def hf_keymap(config: ModelConfig) -> KeyMap:
    """Our names and transformers' for a model of `config`.

    Raises  ConfigError if transformers has no such family.
    """
    return HF[config.family].keymap(config)


def hf_config(
    config: ModelConfig,
    *,
    end_ids: Sequence[int],
    start_id: int | None = None,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """The config.json that makes transformers compute what our model computes.

    end_ids   ids that end a text. start_id: the id before a text, by default the first of them.
    Raises  ConfigError naming the family or the option that transformers cannot express.
    """
    if reason := hf_refuses(config):
        raise ConfigError(reason)
    # What every decoder has stands here once; the family adds its own keys.
    return {
        **HF[config.family].write_config(config),
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **special_id_values(end_ids, start_id),
        "use_cache": True,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def special_id_values(end_ids: Sequence[int], start_id: int | None) -> dict[str, Any]:
    """bos_token_id and eos_token_id, the latter a list where several ids end a text."""
    first = next(iter(end_ids), None)
    if start_id is None:
        start_id = first
    if len(end_ids) > 1:
        return {"bos_token_id": start_id, "eos_token_id": list(end_ids)}
    # A number, as older readers of these files expect it.
    return {"bos_token_id": start_id, "eos_token_id": first}


def hf_refuses(config: ModelConfig) -> str | None:
    """Why transformers cannot compute a model of `config`, in one sentence; None if it can."""
    if config.family not in HF:
        menu = ", ".join(sorted(HF))
        return f"no Hugging Face format is known for model family {config.family!r}; known: {menu}"
    return HF[config.family].refuses(config)


def model_config(
    values: Mapping[str, Any], where: str, vocab_size: int | None = None
) -> ModelConfig:
    """Our config for a config.json of transformers.

    vocab_size  the tokenizer's, if there is one; the file has the padded size alone.
    Raises  ConfigError if the family is unknown or uses an option that our model lacks.
    """
    # By transformers' name of the family, which need not be ours.
    by_type = {HF[name].model_type: HF[name] for name in HF}
    model_type = str(values.get("model_type"))
    if model_type not in by_type:
        menu = ", ".join(sorted(by_type))
        raise ConfigError(
            f"{where}: unknown model_type {model_type!r}; choose one of {menu}"
            f"{nearest(model_type, by_type)}"
        )
    return by_type[model_type].read_config(values, where, vocab_size)


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
    """Weights under our names, in the dtype of the files, and our config.

    Tensors are read when they are asked for, from safetensors alone and never from a pickle.
    `optional` are patterns of our names that the files may lack.
    Raises  CheckpointError if files are missing or broken or the keys do not fit; ConfigError for
            another architecture.
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
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
    files = [folder / str(name) for name in sorted(names)]
    for file in files:
        # A name in the index must not lead out of the folder, which may come from anywhere.
        if file.parent != folder or not file.is_file():
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise CheckpointError(
                f"{folder} has no {file.name}, only {present}; Castalia reads safetensors weights"
            )
    return files


def write_hf(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    end_ids: Sequence[int],
    start_id: int | None = None,
    dtype: str = "fp32",
) -> None:
    """Write config.json, generation_config.json and model.safetensors into `folder`, which exists.

    `end_ids` and `start_id` as in `hf_config`; `dtype` of the stored weights: fp32, bf16 or fp16.
    Raises  ConfigError if transformers cannot express the model; CheckpointError if the keys do not
            fit.
    """
    values = hf_config(config, end_ids=end_ids, start_id=start_id, dtype=dtype)
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", special_id_values(end_ids, start_id))
    theirs = hf_keymap(config).to_theirs(tensors)
    # safetensors refuses views that share memory; `contiguous` makes tensors of their own.
    stored = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in theirs.items()
    }
    save_tensors(stored, folder / "model.safetensors", {"format": "pt"})


def write_hf_tokenizer(folder: Path, *, tokens: Mapping[str, str], max_length: int) -> None:
    """The two small files that AutoTokenizer needs beside tokenizer.json.

    tokens      role and text of the special tokens, {"eos_token": "<|endoftext|>"}.
    max_length  the model's longest sequence, in tokens.
    """
    # The plain fast tokenizer runs tokenizer.json as it is. A model's own class rebuilds parts of
    # it and may split text differently.
    write_json(folder / "special_tokens_map.json", dict(tokens))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
    )
