"""The paths in the config of a run folder, made to hold from any working directory.

A run's config.yaml has the paths that its user typed, relative to the directory of that command.
Read from another directory, or after the run or the tree around it was moved, each still names the
file that the run had.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
MARKS = ("checkpoints", "metrics.jsonl", "command.txt", "env.json")
"""Beside a config.yaml, any of these makes its folder a run folder."""
DIRECTORY = "directory"
"""Key of env.json: the working directory of the run's newest start."""

PATHS = (
    "data.train",
    "data.valid",
    "data.labels",
    "data.valid_labels",
    "data.label_weights",
    "data.valid_label_weights",
    "data.chat",
    "data.valid_chat",
    "data.pairs",
    "data.valid_pairs",
    "data.labelled",
    "data.valid_labelled",
    "data.prompts",
    "data.valid_prompts",
    "data.prepared_in",
    "data.chosen",
    "data.rejected",
    "data.chosen_labels",
    "data.rejected_labels",
    "data.chosen_reference",
    "data.rejected_reference",
    "data.rewards",
    "data.valid_rewards",
    "data.mismatched",
    "data.mismatched_labels",
    "data.valid_mismatched",
    "data.valid_mismatched_labels",
    "data.valid_chosen",
    "data.valid_rejected",
    "data.valid_chosen_labels",
    "data.valid_rejected_labels",
    "data.valid_chosen_reference",
    "data.valid_rejected_reference",
    "data.interventions.file",
    "data.order_cache",
    "data.cache",
    "mixing.record",
    "launch.hostfile",
    "profile.memory_folder",
    "eval.include",
    "eval.results_prefix",
)
"""Keys whose text is always a path."""
NAMES = (
    "data.tokenizer",
    "data.chat_template",
    "model.start",
    "loss.reward_model",
    "eval.tasks",
)
"""Keys whose text is a path or a name, such as `bytes` or a model of a hub: a path if it exists."""
STEP = re.compile(r"(?P<run>.+)[/@](step-?)?\d+")
"""A checkpoint by its step, RUN@1000 or RUN/step1000: see checkpoint/find.py. No file has its
name."""


def run_folder_of(config: str | Path) -> Path | None:
    """The run folder that a config.yaml belongs to; None for any other file.

    The config of a checkpoint, RUN/checkpoints/step-00001000/config.yaml, belongs to RUN.
    """
    config = Path(config)
    if config.name != CONFIG:
        return None
    # Absolute, since `config.yaml` alone has no parents. Links are kept, except before a `..`, for
    # which only the folder they lead to has the right parent.
    folder = config.parent.resolve() if ".." in config.parts else config.parent.absolute()
    if folder.parent.name == "checkpoints" and folder.name.startswith("step-"):
        return folder.parent.parent
    if any((folder / mark).exists() for mark in MARKS):
        return folder
    return None


def anchored(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config values of the run in `folder`, with `output` and every path as of this directory.

    Takes    nested values as config.yaml has them; the absolute path of the run folder.
    Returns  a copy. A path that holds here as it is written stays as it is.
    """
    output = str(values.get("output") or folder)
    base = base_of(folder, output)
    former = joined(base, output)

    def here(text: str) -> str:
        """A path as of this directory."""
        if "://" in text or text.startswith("~"):
            return text
        place = joined(base, text)
        # What lay in the run folder moved with it.
        if place.is_relative_to(former):
            place = folder / place.relative_to(former)
        return text if joined(Path.cwd(), text) == place else str(place)

    def here_if_it_exists(text: str) -> str:
        """A name, or a path as of this directory."""
        # GPT-2's tokenizer is two files: VOCAB.json,MERGES.txt.
        places = [here(part) for part in text.split(",")]
        if not all(map(names_something, places)):
            return text
        return ",".join(places)

    changed = {**values, "output": here(output)}
    for keys, change in ((PATHS, here), (NAMES, here_if_it_exists)):
        for key in keys:
            changed = changed_at(changed, key.split("."), change)
    return changed


def changed_at(values: Any, path: Sequence[str], change: Callable[[str], str]) -> Any:
    """A copy of nested values with the text at `path` changed, in each item of a list."""
    if not path:
        return every_text(values, change)
    if isinstance(values, list):
        return [changed_at(item, path, change) for item in values]
    if not isinstance(values, Mapping) or path[0] not in values:
        return values
    return {**values, path[0]: changed_at(values[path[0]], path[1:], change)}


def names_something(place: str) -> bool:
    """Whether a path exists, or the run whose step it names."""
    of_run = STEP.fullmatch(place)
    return os.path.exists(place) or (of_run is not None and os.path.isdir(of_run["run"]))


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """A text or each text of a list, changed; any other value as it is."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [every_text(item, change) for item in value]
    return value


def base_of(folder: Path, output: str) -> Path:
    """The directory that the relative paths of the run in `folder` are relative to."""
    recorded = recorded_directory(folder)
    if recorded is not None and same_folder(recorded / output, folder):
        return recorded
    # No record, or the tree was moved whole: /new/runs/a with output `runs/a` began in /new.
    parts = Path(os.path.normpath(output)).parts
    if not os.path.isabs(output) and folder.parts[-len(parts) :] == parts:
        return Path(*folder.parts[: -len(parts)])
    # The run alone was moved: its data stayed where it was started, if that is on this machine.
    if recorded is not None and recorded.is_dir():
        return recorded
    return Path.cwd()


def recorded_directory(folder: Path) -> Path | None:
    """The working directory of the run's newest start; None if it was not recorded."""
    try:
        facts = json.loads((folder / "env.json").read_text(encoding="utf-8"))
        return Path(facts[DIRECTORY])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a run of an earlier version, or a damaged file


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths name one folder, whatever links lead to it."""
    return one.is_dir() and other.is_dir() and one.samefile(other)


def joined(base: Path, text: str) -> Path:
    """`text` below `base`, or alone if it is absolute; without `..`."""
    return Path(os.path.normpath(base / text))
