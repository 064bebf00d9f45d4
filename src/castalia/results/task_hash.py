"""The hash of a task's resolved config: which question a number answers."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HASH_DIGITS = 16
MACHINE_KEYS = ("config_source", "pretrained", "tokenizer")
"""Metadata of a task that the machine or the model decide."""
PATH_KEYS = ("data_files", "data_dir")
"""Arguments of datasets.load_dataset that are paths."""


class Prompting(NamedTuple):
    """What decides the prompts beside the config of a task."""

    chat_template: str | None = None
    """The text of the template that prompts are written with."""
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    """With a chat template: whether examples are turns."""
    fewshot_seed: int = 1234
    """Seed of the choice of examples; the default is the harness's."""

    def facts(self, shots: int | None) -> dict[str, Any]:
        """What differs from the usual, as keys beside those of a config."""
        facts: dict[str, Any] = {}
        if self.chat_template:
            facts["chat_template"] = self.chat_template
            if shots and not self.fewshot_as_multiturn:
                facts["fewshot_as_multiturn"] = False
        if self.system_instruction:
            facts["system_instruction"] = self.system_instruction
        if shots and self.fewshot_seed != Prompting().fewshot_seed:
            facts["fewshot_seed"] = self.fewshot_seed
        return facts


def config_hash(config: Mapping[str, Any], prompting: Prompting = Prompting()) -> str:
    """SHA-256 of a task's resolved config, 16 digits: the same on every machine.

    Not in it: paths of this machine, and the number of shots, which results have a column for.
    """
    facts = portable(config) | prompting.facts(config.get("num_fewshot"))
    text = json.dumps(facts, sort_keys=True, default=plain)
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
    text = str(value)
    # The default text of an object holds its address, which differs between processes.
    if " at 0x" in text:
        return type(value).__name__
    return text


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what the machine decides."""
    kept = {key: value for key, value in config.items() if key != "num_fewshot"}
    metadata = kept.get("metadata")
    if isinstance(metadata, Mapping):
        kept["metadata"] = {k: v for k, v in metadata.items() if k not in MACHINE_KEYS}
    arguments = kept.get("dataset_kwargs")
    if isinstance(arguments, Mapping):
        # The last part of a path is what the task is about.
        names = {key: last_parts(arguments[key]) for key in PATH_KEYS if key in arguments}
        kept["dataset_kwargs"] = {**arguments, **names}
    path = kept.get("dataset_path")
    # A relative one is a name of the hub, OWNER/NAME.
    if isinstance(path, str) and Path(path).is_absolute():
        kept["dataset_path"] = Path(path).name
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
