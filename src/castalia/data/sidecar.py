"""`PREFIX.json`, the record beside a token file: what it holds and where that came from."""

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
    """The record of a token file; None if there is none, as with files of GPT-NeoX.

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
            f"{path}: not the JSON record of a token file (a {type(record).__name__}); remove it"
        )
    return record


def finish(writer: IndexedDatasetWriter, prefix: str, made_of: dict[str, Any]) -> dict[str, Any]:
    """Close a token file and write its record: counts, hash and what it was made of. Returns the record."""
    record = {
        "prefix": Path(prefix).name,
        "documents": len(writer.sizes),
        "tokens": writer.tokens,
        "dtype": writer.dtype.name,
        "bin_sha256": writer.digest.hexdigest(),
        **made_of,
    }
    writer.close()
    write_json(prefix + ".json", record)
    return record


def tokenizer_facts(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Tokenizer, vocabulary and end of document as the records of the inputs have them, where any has.

    Raises  DataError if two inputs were made with different tokenizers.
    """
    facts: dict[str, Any] = {}
    first: dict[str, str] = {}
    for dataset in datasets:
        record = read_record(dataset.prefix) or {}
        for key in ("tokenizer", "vocab_size", "append_eod"):
            if key not in record:
                continue
            known = facts.setdefault(key, record[key])
            if key in first and known != record[key] and key != "append_eod":
                raise DataError(
                    f"{dataset.prefix} and {first[key]} were made with different tokenizers ({key} differs in their"
                    " .json records); prepare both with one"
                )
            facts[key] = facts[key] if facts[key] == record[key] else None
            first.setdefault(key, dataset.prefix)
    return facts


def require_tokenizer(prefix: str, tokenizer: Tokenizer, option: str = "--tokenizer") -> None:
    """The tokenizer is that of the token file, so far as a record says: another one makes other text of its ids.
    `option` is where it is named.

    Raises  ConfigError naming the right one.
    """
    made = (read_record(prefix) or {}).get("tokenizer")
    if isinstance(made, dict) and made.get("sha256") not in (None, tokenizer.sha256):
        raise ConfigError(
            f"{prefix} was made with the tokenizer {made.get('name')}, and {tokenizer.where} is another one (the"
            f" SHA-256 in {prefix}.json differs); name that one with {option}"
        )


def refuse_inputs(output: str, datasets: Iterable[IndexedDataset]) -> None:
    """The output's files are none of an input's.

    Raises  ConfigError naming the input.
    """
    written = {Path(output + suffix).resolve() for suffix in (".bin", ".idx", ".json")}
    for dataset in datasets:
        held = {dataset.bin_path, dataset.idx_path, *dataset.shards}
        if written & {path.resolve() for path in held}:
            raise ConfigError(
                f"{dataset.prefix} would be overwritten by the output {output}; choose another --output"
            )
