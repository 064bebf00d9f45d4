"""`Format`: what a format of exports declares, and the registry of all formats.

Which engine of Castalia reads a format is declared by the engine (`Engine.export_kind`); a format
asks that engine whether it computes a model before a weight is read.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from castalia.checkpoint.hf.shards import MAX_SHARD_SIZE
from castalia.core.registry import Registry
from castalia.export.certificate import Reader, program_of
from castalia.export.neox_config import NeoxShape
from castalia.export.written import own_reader
from castalia.formats.saved_model import SavedModel
from castalia.inference.engine import Engine
from castalia.inference.engines import engine_of_export
from castalia.inference.exported import ExportFolder
from castalia.models.model_config import ModelConfig


class Format(ABC):
    """One format: its options, the models that it can express, and its writer."""

    name: ClassVar[str]
    """The value of `--to`."""
    program: ClassVar[str]
    """The program that reads the format, for the card."""
    library: ClassVar[str] = "castalia"
    """What the Hugging Face hub calls the program, in the metadata of the card."""
    use: ClassVar[str]
    """A line of Python that loads the export; {folder} is its name, {auto} transformers' class."""
    option: ClassVar[str] = "quantization"
    """The option that chooses how weights are stored, dtype or quantization."""
    choices: ClassVar[tuple[str, ...]]
    default: ClassVar[str]
    needs_tokenizer: ClassVar[bool] = False

    @classmethod
    def engine(cls) -> type[Engine] | None:
        """The engine of Castalia that reads the format; None if only other programs do."""
        return engine_of_export(cls.name)

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """Why the format cannot hold a model of `config` in `numbers`, or None if it can."""
        engine = cls.engine()
        if engine is None:
            return None
        return engine.refuses(config)

    @classmethod
    def expressed(cls, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """The model that the program computes in place of `config`, and what differs, in
        sentences."""
        return config, []

    @classmethod
    def longest(cls, config: ModelConfig) -> int:
        """Tokens of the longest text that the program reads at once."""
        return config.max_position_embeddings

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """What the program computes or reads differently."""
        return lost_numerics(source.config, "rope_numerics", "rotary angles")

    @classmethod
    def reader(cls, written: ExportFolder) -> Reader:
        """The program that computes the logits of an export, for its certificate.

        The engine of the format where its package is installed, else Castalia's own reader of such
        folders, with a note.
        """
        engine = cls.engine()
        if engine is None:
            return own_reader(written)
        if not engine.is_installed():
            return own_reader(written, f"{engine.name} is not installed")
        chosen = engine
        # Named, because auto would compute in another dtype than the files store.
        return Reader(
            program_of(chosen),
            written.numbers,
            lambda: chosen.from_export(written, written.numbers).logits,
        )

    @classmethod
    @abstractmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """Write the model into `folder`, which exists.

        Raises  ConfigError if the format cannot hold the vocabulary; CheckpointError if tensors do
                not fit the config.
        """


class ShardedFormat(Format):
    """A format whose weights may be several files, each of a bounded size."""

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`."""
        cls.write_shards(folder, source, numbers, MAX_SHARD_SIZE)

    @classmethod
    @abstractmethod
    def write_shards(
        cls, folder: Path, source: SavedModel, numbers: str, max_shard_size: str
    ) -> None:
        """Write the model into `folder`, with weight files of at most `max_shard_size`, such as
        5GB."""


def lost_numerics(config: ModelConfig, option: str, what: str) -> list[str]:
    """A note that the export computes in float32 what the model was trained to round."""
    value = getattr(config, option, "fp32")
    if value == "fp32":
        return []
    return [f"{option}={value} is not kept: the export computes {what} in float32"]


class ParallelFormat(Format):
    """A format whose files are those of the ranks of a training run."""

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`."""
        cls.write_ranks(folder, source, numbers, NeoxShape())

    @classmethod
    @abstractmethod
    def write_ranks(cls, folder: Path, source: SavedModel, numbers: str, shape: NeoxShape) -> None:
        """Write the model into `folder`, divided over the ranks of `shape`."""


EXPORTS: Registry[type[Format]] = Registry("export format")
"""Formats by the names that `--to` takes."""
