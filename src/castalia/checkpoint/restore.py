"""A run fetched from its mirror: the newest whole step, its hashes checked, and the logs."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from castalia.checkpoint.find import complete_steps
from castalia.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    read_manifest,
)
from castalia.checkpoint.mirror import (
    CHECKPOINTS,
    LEDGER,
    LOG_FOLDERS,
    LOGS_RECORD,
    Mirror,
    entry_of,
    seal_of,
)
from castalia.checkpoint.names import COMPLETE, step_name
from castalia.checkpoint.save import discard
from castalia.checkpoint.shards import write_bytes
from castalia.core.errors import CheckpointError
from castalia.core.files import on_disk
from castalia.core.log_lines import read_log
from castalia.core.sealed import Seal, fault_of_file
from castalia.storage import ObjectStore, StorageError

Say = Callable[[str], object]
FETCHED = ".fetched"
"""End of the name of a folder that a step is fetched into; a killed fetch goes on there."""
FETCHES = 2
"""Times that a log is fetched whose bytes differ: they may have changed on the way."""
LINES = ".jsonl"
"""Suffix of the logs whose lines have checksums."""


def newest_step(folder: Path) -> int:
    """The newest complete step of a local run; -1 without one."""
    return max(complete_steps(folder / CHECKPOINTS), default=-1)


def restore(mirror: Mirror, say: Say) -> int | None:
    """Fetch the newest whole step that is newer than those of the run folder, and the logs.

    A damaged step is told, and the next older one taken. The step has its name last, so that a
    fetch that is killed begins again. Returns the step, None if the run folder is as new.
    Raises  StorageError; CheckpointError if the mirror has steps and none of them is whole.
    """
    folder = mirror.folder
    here = newest_step(folder)
    newer = [step for step in reversed(mirror.steps()) if step > here]
    step, damages = fetch_newest(mirror, newer, say)
    if step is not None:
        fetch_logs(mirror, say)
        give_name(mirror, step)
    elif damages and here < 0:
        raise CheckpointError(
            f"none of the steps in {mirror.store.url} is whole; choose another checkpoint.mirror to"
            f" begin anew: {damages[0]}"
        )
    return step


def rescue(mirror: Mirror, above: int, say: Say) -> int | None:
    """Fetch the newest whole step after `above`, where those here are damaged; None if the mirror
    has none either.

    The logs here stay: they reach the newest step that was saved here. What is newer on the mirror
    was looked at by `restore`.
    Raises  StorageError.
    """
    newest = newest_step(mirror.folder)
    steps = [step for step in reversed(mirror.steps()) if above < step <= newest]
    step, _ = fetch_newest(mirror, steps, say)
    if step is not None:
        give_name(mirror, step)
    return step


def fetch_newest(mirror: Mirror, steps: list[int], say: Say) -> tuple[int | None, list[str]]:
    """The first whole one of `steps`, in its hidden folder, and the faults of those before it."""
    damages = []
    for step in steps:
        try:
            fetch_step(mirror, step)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            say(f"castalia: warning: {error}; the next older step is taken")
            mirror.distrust(step)
            continue
        return step, damages
    return None, damages


def hidden_folder(mirror: Mirror, step: int) -> Path:
    """The folder that a step is fetched into."""
    return mirror.folder / CHECKPOINTS / f".{step_name(step)}{FETCHED}"


def fetch_step(mirror: Mirror, step: int) -> None:
    """Fetch a step into its hidden folder, every file compared with the manifest.

    Raises  DamagedCheckpointError naming the object; StorageError.
    """
    url = mirror.store.url_of(mirror.place(step))
    hidden = hidden_folder(mirror, step)
    hidden.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, COMPLETE):
        write_bytes(hidden / name, read_object(mirror.store, f"{mirror.place(step)}/{name}"))
    try:
        manifest = read_manifest(hidden)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{url} is damaged: {error}") from None
    if manifest.step != step:
        raise DamagedCheckpointError(f"{url} holds step {manifest.step}; it was renamed")
    fetch_files(mirror, step, hidden, manifest)


def read_object(store: ObjectStore, name: str) -> bytes:
    """The content of a small object of a complete step.

    Raises  DamagedCheckpointError if it is missing; StorageError.
    """
    try:
        return store.read(name)
    except StorageError as error:
        if error.missing:
            raise DamagedCheckpointError(f"{error}, and {COMPLETE} says that it does") from None
        raise


def fetch_files(mirror: Mirror, step: int, hidden: Path, manifest: Manifest) -> None:
    """Fetch the files of a manifest that are not there yet."""
    for item in list(hidden.iterdir()):
        # Of an earlier fetch, before the step was saved anew.
        if item.name not in (*manifest.files, MANIFEST, COMPLETE):
            item.unlink()
    seals = {name: Seal(entry.sha256, entry.size) for name, entry in manifest.files.items()}
    fetch_sealed(mirror.store, f"{mirror.place(step)}/", seals, hidden)
    on_disk(hidden)


def fetch_sealed(store: ObjectStore, place: str, seals: Mapping[str, Seal], folder: Path) -> None:
    """Fetch the files below `place` that are not in the folder yet, each compared with its seal.

    Raises  DamagedCheckpointError naming the object; StorageError.
    """
    for name, seal in seals.items():
        path = folder / name
        if path.exists() and fault_of_file(path, seal) is None:
            continue
        fetch_file(store, f"{place}{name}", path, seal)


def fetch_file(store: ObjectStore, name: str, path: Path, seal: Seal) -> None:
    """Fetch one file and compare it with its seal."""
    url = store.url_of(name)
    try:
        size = store.facts(name).size
        if seal.size not in (None, size):
            raise DamagedCheckpointError(
                f"{url} is damaged: it has {size} bytes, expected {seal.size}"
            )
        store.fetch(name, path, size)
    except StorageError as error:
        if error.missing:
            raise DamagedCheckpointError(f"{error}, and the manifest lists it") from None
        raise
    if fault_of_file(path, seal) is not None:
        path.unlink()
        raise DamagedCheckpointError(f"{url} is damaged: its SHA-256 is not the one of its save")


def fetch_logs(mirror: Mirror, say: Say) -> None:
    """Fetch the logs over those of the run folder, which are older or of the same steps.

    A damaged one is told, and taken as it is: what it has is better than nothing, and whoever reads
    its lines checks them.
    """
    recorded = mirror.read_json(LOGS_RECORD)
    for name, size in mirror.store.sizes().items():
        parts = PurePosixPath(name).parts
        is_log = len(parts) == 1 or parts[0] in LOG_FOLDERS
        # Names come from whoever may write there: none may lead out of the folder.
        if not is_log or parts[0] == LEDGER or any(part.startswith(".") for part in parts):
            continue
        path = mirror.folder / name
        half = path.with_name(f".{path.name}{FETCHED}")
        fault = None
        for _ in range(FETCHES):
            mirror.store.fetch(name, half, size)
            fault = fault_of_log(half, path.suffix, recorded.get(name, []))
            if fault is None:
                break
        if fault is not None:
            say(
                f"castalia: warning: {mirror.store.url_of(name)} is damaged: {fault}; it is taken"
                " as it is"
            )
        os.replace(half, path)


def fault_of_log(path: Path, suffix: str, entry: list[Any]) -> str | None:
    """Why a fetched log is not as it was sent, or None.

    entry  size and hash, and those of its forerunner if it was on its way; empty if not recorded.
    """
    pairs = [entry[place : place + 2] for place in range(0, len(entry), 2)]
    if entry_of(seal_of(path)) in pairs:
        return None
    if suffix == LINES:
        # Each line has a checksum of its own, which says where.
        faulty = next((line for line in read_log(path) if line.fault is not None), None)
        if faulty is not None:
            return f"line {faulty.number}: {faulty.fault}"
    if not entry:
        # Of an older version, which recorded nothing.
        return None
    return "its SHA-256 is not that of the log that was sent"


def give_name(mirror: Mirror, step: int) -> None:
    """Let a fetched step exist."""
    place = mirror.folder / CHECKPOINTS / step_name(step)
    if place.exists():
        # Incomplete or damaged: a whole one would not have been fetched.
        discard(place)
    os.rename(hidden_folder(mirror, step), place)
    on_disk(place.parent)
    for left in place.parent.glob(f".*{FETCHED}"):
        shutil.rmtree(left, ignore_errors=True)
