"""The adapter of a model as a folder of PEFT."""

from pathlib import Path

import torch

from castalia.checkpoint.hf import DTYPES
from castalia.core.errors import ConfigError
from castalia.export.format import Format
from castalia.formats.adapted import weights_hash
from castalia.formats.additions import module_map
from castalia.formats.peft import write_peft
from castalia.formats.saved_model import SavedModel
from castalia.models.model_config import ModelConfig


def peft_notes(source: SavedModel) -> list[str]:
    """What PEFT needs beside the folder."""
    part = source.adapter
    if part is None or not part.base.is_checkpoint:
        return []
    return [
        f"PEFT needs the base as a folder of transformers: castalia export {part.base.folder}"
        " --to hf --output BASE, and BASE in place of base_model_name_or_path"
    ]


def export_peft(folder: Path, source: SavedModel, dtype: torch.dtype) -> None:
    """Write the adapter of `source` into `folder`.

    Raises  ConfigError for a model without an adapter, or one that PEFT has no such folder for.
    """
    part = source.adapter
    if part is None:
        raise ConfigError(
            f"{source.folder} is a model of its own and no adapter; export it with --to hf"
        )
    if part.replaced or not part.additions:
        what = ", ".join(sorted(part.replaced)[:3])
        raise ConfigError(
            f"PEFT's LoRA folders hold no {what}; adapter.kind {part.kind} is exported merged:"
            " --to hf"
        )
    write_peft(
        folder,
        part.additions,
        source.config,
        part.base.tensors,
        base_name=part.base_name,
        base_hash=weights_hash(part.base),
        dropout=part.dropout,
        rslora=part.rslora,
        dtype=dtype,
    )


class Peft(Format):
    """The adapter alone, as a folder of PEFT."""

    name = "peft"
    program = "PEFT"
    library = "peft"
    use = 'peft.PeftModel.from_pretrained(base, "{folder}")'
    option = "dtype"
    choices = tuple(DTYPES)
    default = "fp32"

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """See `Format`; the modules need the names of transformers."""
        try:
            module_map(config)
        except ConfigError as error:
            return str(error)
        return None

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """See `Format`."""
        return peft_notes(source)

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`.

        Raises  ConfigError for a model without an adapter, or one that PEFT has no folder for.
        """
        export_peft(folder, source, DTYPES[numbers])
