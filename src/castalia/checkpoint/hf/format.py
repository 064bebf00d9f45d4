"""`HfFormat`: what Castalia must know of one family's folders in transformers' format."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from castalia.checkpoint.keymap import KeyMap
from castalia.core.errors import ConfigError
from castalia.models.config import ModelConfig

MOST_PADDING = 1024
"""Rows of an embedding beyond the tokenizer's ids that pass whatever the size of the vocabulary.
Published models pad by less than 2%: Phi-2 has 905 such rows of 51,200."""


class HfFormat(ABC):
    """Names of tensors and of config keys, both ways."""

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    architectures: ClassVar[tuple[str, ...]] = ()
    """Values of `architectures` in config.json that are read, the one that is written first. Empty
    for any."""

    @abstractmethod
    def keymap(self, config: Any) -> KeyMap:
        """Our names and transformers' for a model of `config`."""

    @abstractmethod
    def write_config(self, config: Any) -> dict[str, Any]:
        """The keys of config.json that are this family's own, architecture included."""

    @abstractmethod
    def read_config(
        self, values: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> ModelConfig:
        """Our config for a config.json; see `castalia.checkpoint.hf.model_config`."""

    def refuses(self, config: Any) -> str | None:
        """Why transformers cannot compute a model of `config`, in one sentence; None if it can."""
        return None


def shape_of(values: Mapping[str, Any], where: str, vocab_size: int | None) -> dict[str, Any]:
    """The part of our config that every decoder has, out of transformers' keys.

    The file knows the rows of the embedding alone; `vocab_size` is the tokenizer's, if there is
    one.
    Raises  ConfigError if a key is missing or the tokenizer has more ids than the embedding rows.
    """
    padded = require_int(values, "vocab_size", where)
    if vocab_size is not None and vocab_size > padded:
        raise ConfigError(
            f"{where}: the tokenizer has {vocab_size} ids but the embedding only {padded} rows;"
            " copy the tokenizer of this model"
        )
    real = vocab_size or padded
    if padded > 2 * real and padded - real > MOST_PADDING:
        raise ConfigError(
            f"{where}: the tokenizer has {real} ids and the embedding {padded} rows, so it belongs"
            " to another vocabulary; copy the tokenizer of this model, or remove it to work with"
            " token ids"
        )
    # GPT-NeoX pads to multiples of 128; any other count of rows is taken as its own unit.
    unit = 128 if -(-real // 128) * 128 == padded else padded
    return {
        "num_layers": require_int(values, "num_hidden_layers", where),
        "hidden_size": require_int(values, "hidden_size", where),
        "vocab_size": real,
        "make_vocab_size_divisible_by": unit,
        "max_position_embeddings": values.get("max_position_embeddings", 2048),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
    }


def require_int(values: Mapping[str, Any], key: str, where: str) -> int:
    """Raises  ConfigError if the key is missing."""
    if key not in values:
        raise ConfigError(f"{where}: {key} is missing")
    return int(values[key])
