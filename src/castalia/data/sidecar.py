"""`PREFIX.json`, the record beside a token file: its contents and their origin."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import write_json
from castalia.data.indexed import IndexedDataset, IndexedDatasetWriter
from castalia.data.seals import (
    entries_of,
    fault_of,
    path_of,
    recorded_files,
    require_own,
    sealed,
)
from castalia.data.shards import base_of
from castalia.storage.twins import twin
from castalia.storage.urls import is_url
from castalia.tokenizers.tokenizer import Tokenizer

REMEDY = "choose another --output, or replace it with --overwrite"
"""How to go on where another job's token files are at the output."""


def read_record(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of a token file; None without one, as beside GPT-NeoX's files.

    Raises  DataError if it is not a JSON object, or not as it was written.
    """
    path = Path((twin(os.fspath(prefix)) if is_url(prefix) else os.fspath(prefix)) + ".json")
    try:
        text = path.read_bytes().decode("utf-8")
        record = json.loads(text)
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
    require_own(path, text, record)
    return record


def close_with_record(
    writer: IndexedDatasetWriter,
    prefix: str,
    origin: dict[str, Any],
    beside: Iterable[str] = (),
) -> dict[str, Any]:
    """Close a token file and write its record: counts, hashes and `origin`, what it was made from.

    `beside` are the suffixes of other files of the prefix, which are hashed where they exist.
    Returns the record.
    """
    record = {
        "prefix": Path(prefix).name,
        "documents": len(writer.sizes),
        "tokens": writer.tokens,
        "dtype": writer.dtype.name,
        "bin_sha256": writer.digest.hexdigest(),
        **origin,
    }
    writer.close()
    files = {**writer.entries, **entries_of(prefix, beside)}
    # Last: a record without its token file would describe nothing.
    whole = sealed(record, files)
    write_json(prefix + ".json", whole)
    return whole


def faults_of(prefix: str) -> Iterator[str]:
    """A sentence about each file of a prefix that is not as its record says, by reading all."""
    try:
        recorded = recorded_files(prefix, read_record(prefix) or {})
    except DataError as error:
        yield str(error)
        return
    for name, file in recorded.items():
        if fault := fault_of(file):
            yield f"{path_of(prefix, name)} {fault}"


def tokenizer_facts(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Tokenizer, vocabulary and end of document according to the inputs' records.

    `append_eod` and `eod` are None where the inputs differ in it.
    Raises  DataError if two inputs were made with different tokenizers.
    """
    facts: dict[str, Any] = {}
    first_with: dict[str, str] = {}
    for dataset in datasets:
        record = read_record(dataset.prefix) or {}
        for key in ("tokenizer", "vocab_size", "append_eod", "eod"):
            if key not in record:
                continue
            if key not in facts:
                facts[key] = record[key]
                first_with[key] = dataset.prefix
            elif facts[key] == record[key]:
                continue
            elif key in ("append_eod", "eod"):
                facts[key] = None
            elif key == "tokenizer" and same_tokenizer(facts[key], record[key]):
                continue
            else:
                raise DataError(
                    f"{dataset.prefix} and {first_with[key]} were made with different tokenizers"
                    f" ({key} differs in their .json records); prepare both with the same one"
                )
    return facts


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two records name the same tokenizer, whatever token ends their documents."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return False
    # Two records without a hash are not known to be of one tokenizer.
    return a.get("sha256") is not None and a.get("sha256") == b.get("sha256")


def recorded_end(prefixes: Iterable[str | os.PathLike[str]]) -> int | None:
    """The id that ends each document of token files, according to their records.

    None if no record tells, or documents have no end.
    Raises  DataError if two files differ in it.
    """
    first: tuple[int, str] | None = None
    for prefix in prefixes:
        number = end_of_record(read_record(prefix) or {})
        if number is None:
            continue
        if first is None:
            first = (number, os.fspath(prefix))
        elif first[0] != number:
            raise DataError(
                f"{os.fspath(prefix)} ends its documents with token {number}, {first[1]} with"
                f" {first[0]}, according to their records; prepare both with the same --eod"
            )
    if first is None:
        return None
    return first[0]


def end_of_record(record: dict[str, Any]) -> int | None:
    """The id after each document of one token file; None if its record does not tell."""
    section = record.get("eod")
    key = "id"
    # Older records tell the tokenizer's own end, and whether it was appended.
    if section is None and record.get("append_eod"):
        section = record.get("tokenizer")
        key = "eod_id"
    if isinstance(section, dict) and isinstance(section.get(key), int):
        return int(section[key])
    return None


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


def token_files(prefix: str) -> list[str]:
    """The files that exist at the prefix of a token file, whole or in shards."""
    names = [Path(prefix + suffix) for suffix in (".bin", ".idx", ".json")]
    shards = sorted(Path(prefix).parent.glob("*-of-*.bin"))
    existing = [path for path in names if path.exists()]
    existing += [path for path in shards if base_of(path.name) == Path(prefix).name]
    return [str(path) for path in existing]


def unknown_origin(prefix: str) -> ConfigError:
    """The error for token files at `prefix` whose record does not say that this job made them."""
    first, *_ = token_files(prefix)
    return ConfigError(f"{first} exists, and no record says that this job made it; {REMEDY}")


def require_same(prefix: str, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Require that the facts of the token files at `prefix` are those of the job that would write
    there.

    Raises  ConfigError naming the first fact that differs.
    """
    for name in wanted | existing:
        before = existing.get(name)
        now = wanted.get(name)
        if before != now:
            first, *_ = token_files(prefix)
            raise ConfigError(
                f"{first} exists, made by another job: {name} {as_words(before)}, now"
                f" {as_words(now)}; {REMEDY}"
            )


def as_words(value: Any) -> str:
    """A fact of a record for an error, at most 100 characters of it."""
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"


def refuse_to_replace(prefix: str, job: dict[str, Any], overwrite: bool) -> None:
    """Refuse to write over token files of another job, unless `overwrite`.

    `job` are facts of the record that say what the output is made from.
    Raises  ConfigError.
    """
    if overwrite or not token_files(prefix):
        return
    record = read_record(prefix) or {}
    # The record of another verb lacks this one's section.
    if not job.keys() <= record.keys():
        raise unknown_origin(prefix)
    # As a record has it: tuples became lists.
    require_same(prefix, narrowed(record, job), json.loads(json.dumps(job)))


def narrowed(record: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The facts of a record that `job` has as well, in its sections too: others are results."""
    facts = {}
    for name, value in job.items():
        fact = record.get(name)
        if isinstance(value, dict) and isinstance(fact, dict):
            fact = narrowed(fact, value)
        facts[name] = fact
    return facts


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
