"""The harness's results as rows: one number a row."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.eval.harness.sources import PATH_KEYS

MACHINE_KEYS = ("config_source", "pretrained", "tokenizer")
"""Metadata of a task that the machine or the model decide."""
NO_RESULTS = ("alias", "name", "sample_len", "sample_count", "samples")
"""Keys of a task's results that are no metrics."""


class Number(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    """The harness's filter of the answers; `none` without one."""
    shots: int | None
    """For a group whose tasks differ in it, what was asked for."""
    value: float
    stderr: float | None
    documents: int
    """Documents that the number is a mean of."""
    higher_is_better: bool | None
    task_version: str | None
    task_hash: str
    """SHA-256 of the task's resolved config, 16 digits."""
    seconds: float
    """Time of the task; a task of a group gets the group's time in proportion to its tokens."""


def numbers_of(
    results: Mapping[str, Any],
    hashes: Mapping[str, str],
    seconds: Mapping[str, float],
    shots: int | None = None,
) -> list[Number]:
    """Every number in the harness's results; `hashes` and `seconds` by task and group, `shots` as
    they were asked for."""
    numbers = []
    for task, values in results["results"].items():
        for metric, name, value, stderr in metrics_of(values):
            key = f"{metric},{name}"
            documents = values.get("sample_count", {}).get(key, values.get("sample_len", 0))
            version = results["versions"].get(task)
            numbers.append(
                Number(
                    task=task,
                    metric=metric,
                    filter=name,
                    shots=results["n-shot"].get(task, shots),
                    value=value,
                    stderr=stderr,
                    documents=int(documents),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    task_version=None if version in (None, "N/A") else str(version),
                    task_hash=hashes[task],
                    seconds=seconds[task],
                )
            )
    return numbers


def metrics_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(metric, filter, value, stderr or None) of a task's results, `acc,none` and its like."""
    for key, value in values.items():
        if key in NO_RESULTS or "," not in key or not isinstance(value, int | float):
            continue
        metric, _, name = key.partition(",")
        if metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{name}")
        # "N/A" where the harness knows no error of a metric.
        if not isinstance(stderr, int | float):
            stderr = None
        yield metric, name, float(value), None if stderr is None else float(stderr)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a task's resolved config, 16 digits: the same on every machine.

    Not in it: paths of this machine, and the number of shots, which results have a column for.
    """
    text = json.dumps(portable(config), sort_keys=True, default=plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


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
