"""The hash of a task's resolved config: which question a number answers."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HASH_DIGITS = 16
MACHINE_KEYS = ("config_source", "pretrained", "tokenizer")
"""Metadata of a task that the machine or the model decide."""
PATH_KEYS = ("data_files", "data_dir")
"""Arguments of datasets.load_dataset that are paths."""


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a task's resolved config, 16 digits: the same on every machine.

    Not in it: paths of this machine, and the number of shots, which results have a column for.
    """
    text = json.dumps(portable(config), sort_keys=True, default=plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:HASH_DIGITS]


def plain(value: Any) -> Any:
    """A value that JSON lacks, the same in every process: a function is its source text."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, np.generic):
        return value.item()
    # The default text of an object holds its address.
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what the machine decides."""
    kept = {key: value for key, value in config.items() if key != "num_fewshot"}
    metadata = kept.get("metadata")
    if isinstance(metadata, Mapping):
        kept["metadata"] = {k: v for k, v in metadata.items() if k not in MACHINE_KEYS}
    arguments = kept.get("dataset_kwargs")
    if isinstance(arguments, Mapping):
        kept["dataset_kwargs"] = {
            # The last part of a path is what the task is about.
            key: last_parts(value) if key in PATH_KEYS else value
            for key, value in arguments.items()
        }
    if isinstance(kept.get("dataset_path"), str):
        path = kept["dataset_path"]
        kept["dataset_path"] = Path(path).name if Path(path).is_absolute() else path
    return kept


def last_parts(value: Any) -> Any:
    """Paths in lists and mappings, without their folders."""
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, Mapping):
        return {key: last_parts(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [last_parts(part) for part in value]
    return value
