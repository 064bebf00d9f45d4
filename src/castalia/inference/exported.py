"""Export folders: the record that every export carries, and the model that it describes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.formats.export_record import RECORD, check_export, read_record
from castalia.formats.saved_model import TOKENIZER
from castalia.models.families import build_model_config
from castalia.models.model_config import ModelConfig
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

CHECKPOINTS = ("hf", "neox", "peft", "rwkv")
"""Formats of exports that are read like a checkpoint, on any engine."""
GGUF_FILE = "model.gguf"
"""Name of llama.cpp's file in an export folder."""


@dataclass(frozen=True)
class ExportFolder:
    """One export for an engine of Castalia."""

    folder: Path
    kind: str
    """The value of `castalia export --to`."""
    numbers: str
    """dtype or quantization of the weights."""
    config: ModelConfig
    tokenizer: Tokenizer | None
    step: int | None = None
    special: SpecialIds = field(default_factory=SpecialIds)
    """Ids that begin and end a text."""
    quality: dict[str, Any] | None = None
    """The export against float32 on held-out text; None if it was not measured."""


def open_export(path: Path, *, check: bool = True) -> ExportFolder | None:
    """The export at `path`, a folder or its .gguf file; None if `path` is something else.

    An export that is a checkpoint like any other (hf, neox, rwkv) is None too, and so is a GGUF
    file that another program wrote.
    Takes   check: whether its files are compared with the hashes in its record.
    Raises  CheckpointError if the record or a file is damaged.
    """
    folder = path
    if path.suffix == ".gguf":
        if path.name != GGUF_FILE:
            return None
        folder = path.parent
    if not (folder / RECORD).is_file():
        return None
    record = read_record(folder, check=check)
    # Other programs read these, and so does the reader of checkpoints.
    if record["to"] in CHECKPOINTS:
        return None
    if check:
        check_export(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    return ExportFolder(
        folder=folder,
        kind=record["to"],
        numbers=record["numbers"],
        config=build_model_config(record["model"], str(folder / RECORD)),
        tokenizer=tokenizer,
        step=record.get("step"),
        special=recorded_ids(record, tokenizer),
        quality=record.get("quality"),
    )


def recorded_ids(record: dict[str, Any], tokenizer: Tokenizer | None) -> SpecialIds:
    """The special ids of a record; those of the tokenizer for a record that is older than them."""
    if "end_ids" not in record:
        return SpecialIds.of_tokenizer(tokenizer)
    return SpecialIds(tuple(record["end_ids"]), record.get("start_id"))
