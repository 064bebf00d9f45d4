"""The model of a GPT-NeoX checkpoint, as the YAML files beside it describe it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.config.neox import normal, read_neox
from castalia.config.neox_experts import BEFORE
from castalia.config.neox_keys import ALIASES, HONOURED, NAMES
from castalia.config.values import read_yaml
from castalia.core.errors import CastaliaError, ConfigError
from castalia.formats.neox.experts import ExpertNaming
from castalia.models.config import require_vocabulary
from castalia.models.families import build_model_config
from castalia.models.model_config import BlocksConfig
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

CONFIGS = "configs"
"""The folder in a checkpoint that GPT-NeoX copies a run's YAML files to."""
FILE = "tokenizer.json"
SUFFIXES = (".yml", ".yaml")
OF_A_RUN = ("load", "iteration")
"""Options that name a model's weights and say nothing about the model."""
CHANGES_THE_MODEL = {
    "gpt_j_tied",
    "moe_expert_parallel_size",
    "norm",
    "opt_pos_emb_offset",
    "pos_emb",
    "sliding_window_width",
    "soft_prompt_tuning",
    "use_mup",
    "use_qk_layernorm",
}
"""Options that decide what a model computes, where the reader of configs refuses a value."""


@dataclass(frozen=True)
class NeoxModel:
    """What the files say about the model."""

    values: dict[str, Any]
    """The `model` section, without the rows of the vocabulary."""
    ranks: int
    """model_parallel_size."""
    tokenizer: str | None
    """A name for load_tokenizer."""
    where: str
    """The files, for error messages."""


def config_files(folder: Path) -> list[Path]:
    """The YAML files of a checkpoint: those in its configs/, else beside the weights, else in the
    folder above.

    Raises  ConfigError if there are none.
    """
    for place in (folder / CONFIGS, folder, folder.parent / CONFIGS):
        files = []
        if place.is_dir():
            # Beside weights, a .json is a tokenizer or an index.
            suffixes = SUFFIXES if place == folder else (*SUFFIXES, ".json")
            files = sorted(item for item in place.iterdir() if item.suffix in suffixes)
        if files:
            return files
    raise ConfigError(
        f"{folder} has no {CONFIGS}/*.yml, and GPT-NeoX's weights do not say what the model"
        f" computes; put the run's YAML files into {folder / CONFIGS}, or name them with"
        " `castalia import PATH --config FILE`"
    )


def read_model(files: Sequence[Path], experts: ExpertNaming | None = None) -> NeoxModel:
    """The model that GPT-NeoX's YAML files describe; options about training are not looked at.

    experts  what wrote the experts of the weights: it decides which of GPT-NeoX's options count,
             whose defaults differ.
    Raises  ConfigError with every problem at once.
    """
    options = {str(file): about_model(of_writer(read_yaml(file), experts)) for file in files}
    where = ", ".join(str(file) for file in files)
    reading = read_neox(options, complete=True)
    # Remarks about other sections are about options that were left out above.
    problems = [
        item.text for item in reading.problems if item.key.startswith("model") or not item.key
    ]
    if reading.values.get("adapter", {}).get("kind") == "soft_prompt":
        # A run trains one, but its weights are a layer that a whole model has no place for.
        problems.append(
            "soft_prompt_tuning: its vectors stand in front of every text, and an imported model"
            " has no place for them; import the checkpoint that the prompt was trained over"
        )
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
    values = dict(reading.values.get("model", {}))
    # The unit of padding counts the ranks in.
    tokenizer = reading.values.get("data", {}).get("tokenizer")
    ranks = int(reading.values.get("parallel", {}).get("tp", 1))
    return NeoxModel(values, ranks, tokenizer, where)


def of_writer(values: dict[str, Any], experts: ExpertNaming | None) -> dict[str, Any]:
    """The options as the version that wrote the experts reads them."""
    named = {normal(key): key for key in values}
    if experts is None or "moe_num_experts" not in named:
        return values
    if experts == "newest":
        return {key: value for key, value in values.items() if normal(key) not in BEFORE}
    if "moe_type" in named:
        return values
    return values | {"moe_type": experts}


def about_model(values: dict[str, Any]) -> dict[str, Any]:
    """The options that decide what the model computes, and those that GPT-NeoX does not have."""
    out = {}
    if values.get("mlp_type") == "llama":
        # The first LLaMA blocks, with a gate. Their matrices tell the width, which is 3 / 3 here.
        values = {k: v for k, v in values.items() if k != "mlp_type"}
        values |= {"activation": "swiglu", "intermediate_size": 3}
    for key, value in values.items():
        name = ALIASES.get(normal(key), normal(key))
        honoured = HONOURED.get(name)
        decides = honoured is not None and honoured.path.startswith(("model.", "data.tokenizer"))
        wanted = decides or name in CHANGES_THE_MODEL or name == "model_parallel_size"
        if (wanted and name not in OF_A_RUN) or name not in NAMES:
            out[key] = value
    return out


def find_tokenizer(folder: Path, named: str | None) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, or the one that its config names, where that exists.

    A path in the config is looked for in the checkpoint's folder first: the run may have been on
    another machine.
    """
    places = [
        folder / "tokenizer.json",
        folder.parent / "tokenizer.json",
        folder.parent / "tokenizer",
    ]
    names = [str(place) for place in places if place.exists()]
    if named is not None and "," not in named:
        given = [folder / named, folder.parent / named, Path(named)]
        names += [str(place) for place in given if place.is_file()][:1]
    elif named is not None:
        names.append(named)
    for name in names:
        try:
            return load_tokenizer(name)
        except CastaliaError:
            # Weights are of use without one, and the table at the start says that it is missing.
            continue
    return None


def model_config(
    model: NeoxModel, rows: int, positions: int | None, tokenizer: Tokenizer | None
) -> BlocksConfig:
    """Our config for a model whose embedding has this many rows, and so its learned positions.

    Raises  ConfigError if GPT-NeoX computes something else, or the tokenizer has more ids.
    """
    ids = model.values.get("vocab_size", rows)
    unit = model.values.get("make_vocab_size_divisible_by", 128)
    if tokenizer is not None:
        ids = tokenizer.vocab_size
        require_vocabulary(f"{tokenizer.where} of {model.where}", ids, rows, unit)
    elif -(-ids // unit) * unit != rows:
        # Without its file the number of ids is a guess, which the rows settle.
        ids = rows
    if -(-ids // unit) * unit != rows:
        unit = rows
    values = model.values | {"vocab_size": ids, "make_vocab_size_divisible_by": unit}
    if positions is not None:
        # GPT-NeoX counts the rows of an offset among the positions.
        values["max_position_embeddings"] = positions - values.get("learned_offset", 0)
    config = build_model_config(values, model.where)
    assert isinstance(config, BlocksConfig), "GPT-NeoX has models of blocks alone"
    return config
