"""What the model in `model.start` decides of a config that has no model of its own: fine-tuning
names a start and no shape."""

from typing import Any

from castalia.config.values import Layers, Values, flatten, merge
from castalia.core.errors import ConfigError
from castalia.models.model_config import START

LONGEST_ROW = 2048
"""Tokens of a row where the start's model would take more: longer ones cost memory, and few
conversations need them."""


def take_start(layers: Layers, name: str | None) -> list[str]:
    """Lay the model and the tokenizer of `model.start` below a config without a model; says so.

    `name` is that of the preset.
    Raises  ConfigError if such a config names no start, or its model cannot be built;
            CheckpointError if it cannot be read.
    """
    below = flatten(merge(layers.base, layers.files))
    # A reward model differs from its start by the head alone.
    starts = {f"model.{key}" for key in (*START, "head")}
    if any(key.split(".")[0] == "model" and key not in starts for key in below):
        return []
    values = flatten(layers.resolved())
    path = values.get("model.start")
    if path is None:
        if any(key.split(".")[0] == "model" for key in values) or name is None:
            # A model of its own, in overrides or yet to be written: the check has words for it.
            return []
        raise ConfigError(
            f"{name} fine-tunes a model: name it with model.start=, a run or one of its steps, a"
            " Hugging Face folder, OWNER/NAME of the hub, or another model that castalia reads"
        )
    layers.base = merge(values_of(str(path)), layers.base)
    tokenizer = flatten(layers.base).get("data.tokenizer")
    return [f"the model section is that of model.start {path}, data.tokenizer is {tokenizer}"]


def values_of(path: str) -> Values:
    """The sections `model` and `data` of a config that follow from a start."""
    # Imports torch, which other configs are read without.
    from castalia.formats.saved_model import open_model

    # Hashes are compared by the run; weights that are missing are judged by it.
    saved = open_model(path, check=False, optional=("*",))
    model = saved.config.without_start().model_dump(mode="json")
    data: dict[str, Any] = {"seq_length": min(saved.config.max_position_embeddings, LONGEST_ROW)}
    if saved.tokenizer is not None:
        data["tokenizer"] = saved.tokenizer.where
    return {"model": model, "data": data}
