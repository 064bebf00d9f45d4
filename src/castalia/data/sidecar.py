"""`PREFIX.json`, the record beside a token file: its contents and their origin."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import write_json
from castalia.data.indexed import IndexedDataset, IndexedDatasetWriter
from castalia.data.tokenizer import Tokenizer


def read_record(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of a token file; None without one, as beside GPT-NeoX's files.

    Raises  DataError if it is not a JSON object.
    """
    path = Path(os.fspath(prefix) + ".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not the JSON record of a token file ({error}); remove it or prepare again"
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}: not the JSON record of a token file: expected an object, got"
            f" {type(record).__name__}; remove it"
        )
    return record


def close_with_record(
    writer: IndexedDatasetWriter, prefix: str, origin: dict[str, Any]
) -> dict[str, Any]:
    """Close a token file and write its record: counts, hash and `origin`, what it was made from.
    Returns the record."""
    record = {
        "prefix": Path(prefix).name,
        "documents": len(writer.sizes),
        "tokens": writer.tokens,
        "dtype": writer.dtype.name,
        "bin_sha256": writer.digest.hexdigest(),
        **origin,
    }
    writer.close()
    # Last: a record without its token file would describe nothing.
    write_json(prefix + ".json", record)
    return record


def tokenizer_facts(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Tokenizer, vocabulary and end of document according to the inputs' records.

    `append_eod` is None where the inputs differ in it.
    Raises  DataError if two inputs were made with different tokenizers.
    """
    facts: dict[str, Any] = {}
    first_with: dict[str, str] = {}
    for dataset in datasets:
        record = read_record(dataset.prefix) or {}
        for key in ("tokenizer", "vocab_size", "append_eod"):
            if key not in record:
                continue
            if key not in facts:
                facts[key] = record[key]
                first_with[key] = dataset.prefix
            elif facts[key] == record[key]:
                continue
            elif key == "append_eod":
                facts[key] = None
            else:
                raise DataError(
                    f"{dataset.prefix} and {first_with[key]} were made with different tokenizers"
                    f" ({key} differs in their .json records); prepare both with the same one"
                )
    return facts


def require_tokenizer(prefix: str, tokenizer: Tokenizer, option: str = "--tokenizer") -> None:
    """Check against its record that a token file was made with this tokenizer.

    `option` is the setting that names the tokenizer, for the error.
    Raises  ConfigError naming the right tokenizer.
    """
    recorded = (read_record(prefix) or {}).get("tokenizer")
    if isinstance(recorded, dict) and recorded.get("sha256") not in (None, tokenizer.sha256):
        raise ConfigError(
            f"{prefix} was made with tokenizer {recorded.get('name')}, but {tokenizer.where} is a"
            f" different one (its SHA-256 is not the one in {prefix}.json); give the right one with"
            f" {option}"
        )


def refuse_inputs(output: str, datasets: Iterable[IndexedDataset]) -> None:
    """Check that the output would not overwrite an input.

    Raises  ConfigError naming the input.
    """
    written = {Path(output + suffix).resolve() for suffix in (".bin", ".idx", ".json")}
    for dataset in datasets:
        read = {dataset.bin_path, dataset.idx_path, *dataset.shards}
        if written & {path.resolve() for path in read}:
            raise ConfigError(
                f"{dataset.prefix} would be overwritten by the output {output}; choose another"
                " --output"
            )
