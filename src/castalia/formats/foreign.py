"""Models in the formats of other trainers and engines, read directly: GPT-NeoX checkpoints, Meta's
LLaMA folders, GGUF files of floats, RWKV's .pth files.

A new format is a class here, registered; Hugging Face folders have a room of their own.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from castalia.checkpoint.names import COMPLETE
from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.registry import Registry
from castalia.formats.gguf import find_gguf, read_gguf
from castalia.formats.meta import is_meta_folder, read_meta
from castalia.formats.neox import find_neox, read_neox, step_of
from castalia.formats.rwkv import find_rwkv, read_rwkv
from castalia.models.model_config import ModelConfig
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
CHAT_ENDS = ("<|eot_id|>", "<|eom_id|>")
"""Tokens that end a turn or message of LLaMA 3; a model without chats never writes them."""
GGUF_ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Help:
    """What a user gives where a format does not say it."""

    configs: Sequence[Path] = ()
    """GPT-NeoX's YAML files of the model."""
    tokenizer: str | None = None
    """A name for load_tokenizer."""
    step: int | None = None
    """Of several checkpoints, this one in place of the newest."""
    optional: Collection[str] = field(default_factory=tuple)
    """Patterns of our names that the files may lack."""


class ForeignModel(NamedTuple):
    """A model as it was opened."""

    folder: Path
    config: ModelConfig
    tensors: StoredTensors
    tokenizer: Tokenizer | None
    step: int | None
    special: SpecialIds
    files: tuple[Path, ...]
    """The files of weights."""


class Format(ABC):
    """One format."""

    name: ClassVar[str]
    """In words, for messages."""

    @classmethod
    @abstractmethod
    def find(cls, path: Path, step: int | None = None) -> Path | None:
        """The one model of this format that a path means; None if it means none."""

    @classmethod
    @abstractmethod
    def open(cls, found: Path, given: Help) -> ForeignModel:
        """Open what `find` returned.

        Raises  CheckpointError or ConfigError in one sentence about what is wrong with it.
        """


FORMATS: Registry[type[Format]] = Registry("foreign format")


@FORMATS.register("neox")
class Neox(Format):
    """GPT-NeoX, of a run or of its converters."""

    name = "a GPT-NeoX checkpoint"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Path | None:
        """See `Format`."""
        return find_neox(path, step)

    @classmethod
    def open(cls, found: Path, given: Help) -> ForeignModel:
        """See `Format`."""
        own = None
        if given.tokenizer is not None:
            own = load_tokenizer(given.tokenizer)
        model = read_neox(found, given.configs, given.optional, own)
        special = SpecialIds.of_tokenizer(model.tokenizer)
        step = step_of(found)
        return ForeignModel(
            found, model.config, model.tensors, model.tokenizer, step, special, model.files
        )


@FORMATS.register("meta")
class Meta(Format):
    """LLaMA as Meta distributes it."""

    name = "a LLaMA folder of Meta's"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Path | None:
        """See `Format`."""
        return path if path.is_dir() and is_meta_folder(path) else None

    @classmethod
    def open(cls, found: Path, given: Help) -> ForeignModel:
        """See `Format`."""
        # LLaMA 1 has one tokenizer beside the folders of all sizes.
        tokenizer = tokenizer_of(found, given.tokenizer, (found, found.parent))
        ids = None
        if tokenizer is not None:
            ids = tokenizer.vocab_size
        model = read_meta(found, ids, given.optional)
        special = SpecialIds.of_tokenizer(tokenizer)
        if tokenizer is not None:
            turns = [tokenizer.ids[name] for name in CHAT_ENDS if name in tokenizer.ids]
            start = tokenizer.ids.get("<|begin_of_text|>", tokenizer.ids.get("<s>"))
            special = SpecialIds((*special.end_ids, *turns), start)
        return ForeignModel(
            found, model.config, model.tensors, tokenizer, None, special, model.files
        )


@FORMATS.register("gguf")
class Gguf(Format):
    """A file of llama.cpp, its weights in floats."""

    name = "a GGUF file"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Path | None:
        """See `Format`."""
        return find_gguf(path)

    @classmethod
    def open(cls, found: Path, given: Help) -> ForeignModel:
        """See `Format`."""
        tokenizer = tokenizer_of(found, given.tokenizer, (found.parent,))
        ids = None
        if tokenizer is not None:
            ids = tokenizer.vocab_size
        model = read_gguf(found, ids, given.optional)
        special = gguf_ids(model.metadata, model.config.vocab_size)
        return ForeignModel(
            found.parent, model.config, model.tensors, tokenizer, None, special, model.files
        )


@FORMATS.register("rwkv")
class Rwkv(Format):
    """RWKV 6 and 7 as BlinkDL distributes them."""

    name = "a .pth file of RWKV"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Path | None:
        """See `Format`."""
        return find_rwkv(path)

    @classmethod
    def open(cls, found: Path, given: Help) -> ForeignModel:
        """See `Format`."""
        tokenizer = tokenizer_of(found, given.tokenizer, (found.parent,))
        ids = None
        if tokenizer is not None:
            ids = tokenizer.vocab_size
        model = read_rwkv(found, ids, given.optional)
        special = SpecialIds.of_tokenizer(tokenizer)
        return ForeignModel(
            found.parent, model.config, model.tensors, tokenizer, None, special, model.files
        )


def gguf_ids(metadata: Mapping[str, Any], vocab_size: int) -> SpecialIds:
    """The ids that the file names; one outside the vocabulary is left out."""

    def named(role: str) -> list[int]:
        value = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return [value] if isinstance(value, int) and 0 <= value < vocab_size else []

    ends = [i for role in GGUF_ENDS for i in named(role)]
    start = next(iter(named("bos") + ends), None)
    return SpecialIds(tuple(dict.fromkeys(ends)), start)


def tokenizer_of(found: Path, given: str | None, folders: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer that the user names, or that lies beside a model; None without one.

    Raises  what load_tokenizer raises, for a tokenizer that the user names.
    """
    if given is not None:
        return load_tokenizer(given)
    for folder in folders:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                try:
                    return load_tokenizer(folder / name)
                except ConfigError:
                    # Its library is not installed; the weights are of use without it.
                    return None
    return None


def find_foreign(path: Path, step: int | None = None) -> tuple[type[Format], Path] | None:
    """The format of the model that a path means, and its place; None if it is of none of these."""
    if (path / "checkpoints").is_dir() or (path / COMPLETE).is_file():
        return None  # A run or a step of one, which a file of another program does not hide.
    for name in FORMATS:
        found = FORMATS[name].find(path, step)
        if found is not None:
            return FORMATS[name], found
    return None


def is_foreign(path: Path) -> bool:
    """Whether a path means a model of one of these formats, be it whole or not."""
    try:
        return find_foreign(path) is not None
    except CastaliaError:
        return True
