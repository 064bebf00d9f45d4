"""Whether the data of a run are those that it trained on: all files there, none of them changed."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from castalia.checkpoint import complete_steps, read_state
from castalia.checkpoint.names import step_name
from castalia.core.errors import CheckpointError, DataError
from castalia.corpora.build import find_corpus
from castalia.data.config import DataConfig
from castalia.data.fingerprint import changed, of_training
from castalia.data.indexed import file_pair
from castalia.data.shards import base_of, find_shards
from castalia.runs.config import RunConfig

NAMED = 4
"""Files, or differences, that one error names; of more it gives the number."""


def require_files(config: RunConfig, folder: Path) -> None:
    """Check that the token files of the run in a folder are there.

    A corpus that is gone is not built again: whoever asks for rows wants those that were trained
    on, in a folder that reading does not change.
    Raises  DataError naming the files, and the keys that say where they are now.
    """
    data = config.data
    if not data.train_prefixes:
        place = folder / "data"
        if data.corpus is not None and find_corpus(data.corpus, place) is None:
            raise DataError(
                f"{folder}: the corpus {data.corpus} that the run trained on is no longer in"
                f" {place}; copy it back, or give its token files with data.train=[PREFIX,…]"
            )
        return
    keys = {}
    for key, prefixes in prefixes_of(data).items():
        gone = [prefix for prefix in prefixes if not is_there(prefix)]
        if gone:
            keys[key] = gone
    if not keys:
        return
    files = listed([f"{prefix}.bin and .idx" for gone in keys.values() for prefix in gone])
    places = " ".join(f"{key}=[PREFIX,…]" for key in keys)
    raise DataError(
        f"{folder}: the data that the run trained on are gone: {files}; if they have moved, add"
        f" {places} with all of them, in the order of {folder / 'config.yaml'}"
    )


def prefixes_of(data: DataConfig) -> dict[str, Sequence[str]]:
    """The token files by the key that names them."""
    if not data.paired:
        return {"data.train": data.train}
    return {"data.chosen": data.chosen, "data.rejected": data.rejected}


def is_there(prefix: str) -> bool:
    """Whether a token file is there, whole or in shards; `IndexedDataset` tells what is wrong
    inside."""
    for name in (prefix, base_of(prefix)):
        tokens, index = file_pair(name)
        if index.exists() and (tokens.exists() or find_shards(str(tokens.with_suffix("")))):
            return True
    return False


def require_same_data(
    folder: Path, fingerprint: dict[str, Any], allow_changed: bool, say: Callable[[str], None]
) -> None:
    """Compare the data with those of the newest checkpoint of the run in a folder.

    Without a checkpoint nothing is known. With data.allow_changed a difference is only said.
    Raises  DataError naming the sources and settings that differ.
    """
    trained = newest_fingerprint(folder / "checkpoints")
    differences = []
    # Without a checkpoint the config is all that says what the data were.
    if trained is not None:
        differences = changed(of_training(trained), of_training(fingerprint))
    if not differences:
        return
    text = f"{folder}: the data are no longer those that the run trained on: {listed(differences)}"
    if not allow_changed:
        raise DataError(
            f"{text}; its rows cannot be shown from these. Restore the files and the settings, or"
            " say where the right ones are, as with data.train=[PREFIX,…]"
        )
    say(f"warning: {text} (data.allow_changed is true)")


def training_hash(fingerprint: dict[str, Any]) -> str:
    """16 hex digits that name the rows of training: other validation data have the same."""
    text = json.dumps(of_training(fingerprint), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def newest_fingerprint(checkpoints: Path) -> dict[str, Any] | None:
    """The fingerprint in the newest checkpoint that can be read; None without one."""
    for step in reversed(complete_steps(checkpoints)):
        try:
            state = read_state(checkpoints / step_name(step))
        except CheckpointError:
            continue  # the one before it has the same data
        found = state.get("data")
        if isinstance(found, dict):
            return found
        return None
    return None


def listed(names: Sequence[str]) -> str:
    """The first few of some texts, and how many more there are."""
    more = len(names) - NAMED
    shown = "; ".join(names[:NAMED])
    if more > 0:
        return f"{shown}; and {more} more"
    return shown
