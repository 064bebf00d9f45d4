"""A run fetched from its mirror: the newest whole step, its hashes checked, and the logs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from castalia.checkpoint.find import complete_steps
from castalia.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    fault_of_entry_file,
    read_manifest,
)
from castalia.checkpoint.mirror import CHECKPOINTS, LEDGER, LOG_FOLDERS, Mirror
from castalia.checkpoint.names import COMPLETE, step_name
from castalia.checkpoint.save import discard
from castalia.checkpoint.shards import write_bytes
from castalia.core.errors import CheckpointError
from castalia.core.files import on_disk
from castalia.storage import StorageError

Say = Callable[[str], object]
FETCHED = ".fetched"
"""End of the name of a folder that a step is fetched into; a killed fetch goes on there."""


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
    damages = []
    for step in newer:
        try:
            ready = fetch_step(mirror, step, folder / CHECKPOINTS)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            say(f"castalia: warning: {error}; the next older step is taken")
            mirror.distrust(step)
            continue
        fetch_logs(mirror)
        give_name(ready, folder / CHECKPOINTS / step_name(step))
        return step
    if damages and here < 0:
        raise CheckpointError(
            f"none of the steps in {mirror.store.url} is whole; choose another checkpoint.mirror to"
            f" begin anew: {damages[0]}"
        )
    return None


def fetch_step(mirror: Mirror, step: int, folder: Path) -> Path:
    """Fetch a step into a hidden folder in `folder`, every file compared with the manifest.

    Raises  DamagedCheckpointError naming the object; StorageError.
    """
    url = mirror.store.url_of(mirror.place(step))
    hidden = folder / f".{step_name(step)}{FETCHED}"
    hidden.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, COMPLETE):
        write_bytes(hidden / name, read_object(mirror, step, name))
    try:
        manifest = read_manifest(hidden)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{url} is damaged: {error}") from None
    if manifest.step != step:
        raise DamagedCheckpointError(f"{url} holds step {manifest.step}; it was renamed")
    fetch_files(mirror, step, hidden, manifest)
    return hidden


def read_object(mirror: Mirror, step: int, name: str) -> bytes:
    """The content of a small object of a step."""
    try:
        return mirror.store.read(f"{mirror.place(step)}/{name}")
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
    for name, entry in manifest.files.items():
        if (hidden / name).exists() and fault_of_entry_file(hidden / name, entry) is None:
            continue
        fetch_file(mirror, f"{mirror.place(step)}/{name}", hidden / name, entry)
    on_disk(hidden)


def fetch_file(mirror: Mirror, name: str, path: Path, entry: FileEntry) -> None:
    """Fetch one file and compare it with its entry."""
    url = mirror.store.url_of(name)
    try:
        size = mirror.store.facts(name).size
        if size != entry.size:
            raise DamagedCheckpointError(
                f"{url} is damaged: it has {size} bytes, expected {entry.size}"
            )
        mirror.store.fetch(name, path, entry.size)
    except StorageError as error:
        if error.missing:
            raise DamagedCheckpointError(f"{error}, and the manifest lists it") from None
        raise
    if fault_of_entry_file(path, entry) is not None:
        path.unlink()
        raise DamagedCheckpointError(f"{url} is damaged: its SHA-256 is not the one of its save")


def fetch_logs(mirror: Mirror) -> None:
    """Fetch the logs over those of the run folder, which are older or of the same steps."""
    for name, size in mirror.store.sizes().items():
        parts = PurePosixPath(name).parts
        is_log = len(parts) == 1 or parts[0] in LOG_FOLDERS
        # Names come from whoever may write there: none may lead out of the folder.
        if not is_log or parts[0] == LEDGER or any(part.startswith(".") for part in parts):
            continue
        path = mirror.folder / name
        half = path.with_name(f".{path.name}{FETCHED}")
        mirror.store.fetch(name, half, size)
        os.replace(half, path)


def give_name(hidden: Path, place: Path) -> None:
    """Let a fetched step exist."""
    if place.exists():
        # Incomplete: a complete one would not have been fetched.
        discard(place)
    os.rename(hidden, place)
    on_disk(place.parent)
    for left in place.parent.glob(f".*{FETCHED}"):
        shutil.rmtree(left, ignore_errors=True)
