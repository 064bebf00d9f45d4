"""Hugging Face folders: config.json both ways, safetensors both ways, by architecture.

Reading chooses the architecture by `model_type` of config.json, writing by the options of the
model, see formats.py. The files load in transformers 4.57 and 5.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.hf.format import HfFormat
from castalia.checkpoint.hf.formats import HF, chosen_format
from castalia.checkpoint.hf.shards import MAX_SHARD_SIZE, write_weights
from castalia.checkpoint.hf.split_heads import with_heads_apart
from castalia.checkpoint.hf.weights import equal_tensors, stored_weights
from castalia.checkpoint.keymap import SHOWN_KEYS, KeyMap, Rule, Transform, gathered, matches
from castalia.checkpoint.tensors import FileTensor, StackedTensor, StoredTensor, StoredTensors
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.files import read_json, write_json
from castalia.models import Decoder
from castalia.models.model_config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDING = "embed.weight"
HEAD = "unembed.weight"
"""Our names of the two matrices that a model may share, in every family."""


def hf_keymap(config: ModelConfig) -> KeyMap:
    """Our names and transformers' for a model of `config`.

    Raises  ConfigError if transformers has no such model.
    """
    form = chosen_format(config)
    return form.keymap(form.adopt(config))


def hf_config(
    config: ModelConfig,
    *,
    end_ids: Sequence[int],
    start_id: int | None = None,
    pad_id: int | None = None,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """The config.json that makes transformers compute what our model computes.

    end_ids   ids that end a text. start_id: the id before a text, by default the first of them.
    pad_id    of a reward model, the id that fills rows up; without it transformers scores one text
              at a time.
    Raises  ConfigError naming the family or the options that transformers cannot express.
    """
    form = chosen_format(config)
    # What every decoder has stands here once; the format adds its own keys, or replaces some.
    common = {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return {
        **{form.names.get(key, key): value for key, value in common.items()},
        **form.write_config(config),
        **(classifier_values(form, pad_id) if config.head == "score" else {}),
        **special_id_values(end_ids, start_id),
        "use_cache": True,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def classifier_values(form: HfFormat, pad_id: int | None) -> dict[str, Any]:
    """The keys of config.json that make a reward model of a decoder."""
    return {
        "architectures": [form.classifier],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
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


def model_config(
    values: Mapping[str, Any], where: str, vocab_size: int | None = None
) -> ModelConfig:
    """Our config for a config.json of transformers.

    vocab_size  the tokenizer's, if there is one; the file has the padded size alone.
    Raises  ConfigError if the family is unknown or uses an option that our model lacks.
    """
    model_type = str(values.get("model_type"))
    if model_type not in HF:
        menu = ", ".join(sorted(HF))
        raise ConfigError(
            f"{where}: unknown model_type {model_type!r}; choose one of {menu}"
            f"{nearest(model_type, HF)}"
        )
    form = HF[model_type]
    require_architecture(values, form, where)
    return form.read_config(values, where, vocab_size)


def require_architecture(values: Mapping[str, Any], form: HfFormat, where: str) -> None:
    """Raises  ConfigError if a config.json names another class than the family's decoder with a
    head over the vocabulary or one score, such as a tagger of tokens."""
    named = values.get("architectures")
    if not named or not form.architectures:
        return
    readable = [*form.architectures, *filter(None, [form.classifier])]
    if isinstance(named, list) and any(name in named for name in readable):
        return
    raise ConfigError(
        f"{where}: unknown architectures {named} of model_type {form.model_type!r}; Castalia reads"
        f" {', '.join(readable)}"
    )


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` holds a config.json of transformers."""
    path = folder / "config.json"
    return path.is_file() and "model_type" in read_json(path, CheckpointError)


def read_hf(
    folder: Path, vocab_size: int | None = None, optional: Collection[str] = ()
) -> tuple[StoredTensors, ModelConfig]:
    """Weights under our names, in the dtype of the files, and our config.

    Tensors are read when they are asked for, see weights.py.
    `optional` are patterns of our names that the files may lack.
    Raises  CheckpointError if files are missing or broken, or keys or shapes do not fit;
            ConfigError for another architecture.
    """
    where = folder / "config.json"
    values = read_json(where, CheckpointError)
    config = model_config(values, str(where), vocab_size)
    form = HF[values["model_type"]]
    theirs = fitting_head(stored_weights(folder), config, form, folder, optional)
    rules = form.keymap_of(config, theirs).rules_for(theirs, optional)
    require_shapes(theirs, rules, config, folder)

    def opened(key: str, transform: Transform) -> StoredTensor:
        return replace(theirs[key], transform=transform)

    return StoredTensors(gathered(rules, opened, lambda rows: StackedTensor(tuple(rows)))), config


def fitting_head(
    theirs: dict[str, FileTensor],
    config: ModelConfig,
    form: HfFormat,
    folder: Path,
    optional: Collection[str],
) -> dict[str, FileTensor]:
    """The tensors with one matrix for a tied model, whose files may hold it twice or under the name
    of the head.

    Raises  CheckpointError if config.json says tied and the files have a head of its own, or says
            untied and they have none.
    """
    if config.head == "score":
        return theirs
    untied = config.model_copy(update={"tie_word_embeddings": False})
    names = {rule.ours: (rule.theirs, *rule.aliases) for rule in form.keymap(untied).rules}
    head = next((theirs[name] for name in names[HEAD] if name in theirs), None)
    where = folder / "config.json"
    if head is None:
        if config.tie_word_embeddings or matches(HEAD, optional):
            return theirs
        raise CheckpointError(
            f"{where} says tie_word_embeddings=false, and the weights have no {names[HEAD][0]};"
            " say true if the head is the embedding, or copy the model again"
        )
    if not config.tie_word_embeddings:
        return theirs
    others = {key: tensor for key, tensor in theirs.items() if tensor is not head}
    embedding = next((theirs[name] for name in names[EMBEDDING] if name in theirs), None)
    if embedding is None:
        return others | {names[EMBEDDING][0]: head}
    if not equal_tensors(head, embedding):
        raise CheckpointError(
            f"{where} says tie_word_embeddings=true, but {head.key} differs from {embedding.key};"
            " say false if the head has weights of its own"
        )
    return others


def require_shapes(
    theirs: Mapping[str, FileTensor], rules: Mapping[str, Rule], config: ModelConfig, folder: Path
) -> None:
    """Raises  CheckpointError if a tensor has another shape than the config gives it."""
    # On the meta device the model has shapes and no memory.
    with torch.device("meta"):
        ours = Decoder(config).state_dict()
    wanted = {key: tuple(rule.joined(ours).shape) for key, rule in rules.items()}
    wrong = [key for key in wanted if theirs[key].stored_shape != wanted[key]]
    if not wrong:
        return
    shown = [
        f"{key!r} is {list(theirs[key].stored_shape)}, expected {list(wanted[key])}"
        for key in wrong[:SHOWN_KEYS]
    ]
    more = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
    raise CheckpointError(
        f"the weights in {folder} do not fit its config: {'; '.join(shown)}{more}; config.json"
        " describes another model than the weights"
    )


def write_hf(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    end_ids: Sequence[int],
    start_id: int | None = None,
    pad_id: int | None = None,
    dtype: str = "fp32",
    max_shard_size: str = MAX_SHARD_SIZE,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights into `folder`, which exists.

    `end_ids`, `start_id` and `pad_id` as in `hf_config`; `dtype` of the stored weights: fp32, bf16
    or fp16; `max_shard_size` in decimal units, a larger model becomes shards. One tensor at a time
    is read and converted. `generation` are further keys of generation_config.json, such as
    temperature.
    Raises  ConfigError if transformers cannot express the model; CheckpointError if the keys do not
            fit.
    """
    values = hf_config(config, end_ids=end_ids, start_id=start_id, pad_id=pad_id, dtype=dtype)
    write_json(folder / "config.json", values)
    special = special_id_values(end_ids, start_id)
    write_json(folder / "generation_config.json", {**(generation or {}), **special})
    form = chosen_format(config)
    adopted = form.adopt(config)
    names = form.keymap(adopted)
    tensors = with_heads_apart(tensors, config, adopted)
    # Made of tensors without memory, their model has all names and shapes.
    outlines = {name: torch.empty(shape_in(tensors, name), device="meta") for name in tensors}
    shapes = {name: tuple(value.shape) for name, value in names.to_theirs(outlines).items()}
    rules = {rule.theirs: rule for rule in names.rules}
    write_weights(
        folder, shapes, lambda name: rules[name].joined(tensors), DTYPES[dtype], max_shard_size
    )


def shape_in(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it from the disk."""
    if isinstance(tensors, StoredTensors):
        return tensors.stored(name).shape
    return tuple(tensors[name].shape)


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
