"""Models in object stores: what a URL names is fetched into the cache and read there.

CACHE/models/HASH/AROUND/NAME/checkpoints/step-00001000   a checkpoint: its weights and texts
CACHE/models/HASH/AROUND/NAME/export.json, …              an export

HASH is that of the URL; AROUND and NAME are its last two folders, the suite and the model of its
results. Every file is compared with the hash that the checkpoint or the export has of it, and has
its name once it is whole.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping, Set
from pathlib import Path

from castalia.checkpoint.find import WANTED_STEP, complete_steps, ranges_of
from castalia.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    fault_of_table,
    read_manifest,
)
from castalia.checkpoint.mirror import CHECKPOINTS, Mirror
from castalia.checkpoint.names import COMPLETE, step_name
from castalia.checkpoint.restore import FETCHED, fetch_sealed, read_object
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import cache_folder, claimed
from castalia.core.hub import is_hub_id
from castalia.core.sealed import Seal
from castalia.core.secrets import redacted
from castalia.formats.export_record import RECORD, read_record, seals_of
from castalia.storage import ObjectStore, StorageError
from castalia.storage.urls import is_url

WEIGHTS = "model."
"""Group of the tensors that a reader of a model needs; the optimizer's stay where they are."""
SHARD = ".safetensors"
WAIT_SECONDS = 1800.0
"""Time that another process may take to fetch the same model."""


def is_remote(path: object) -> bool:
    """Whether a path names a model in an object store: s3://, file:// or another URL of fsspec."""
    return is_url(path) and not is_hub_id(str(path))


def local_model(url: str, step: int | None = None) -> Path:
    """The folder in the cache that stands for a run (its newest whole step), URL/step1000, a
    checkpoint or an export at `url`; what is missing there is fetched.

    step  of a run, take this one: another rank has, and newer ones may have come since.

    Without a server, what was fetched before is taken, with a warning.
    Raises  CheckpointError if nothing of ours is there, or it is damaged; StorageError if it cannot
            be fetched; ConfigError if the URL has parts that name no folder.
    """
    url = url.rstrip("/")
    if {".", ".."} & set(url.split("/")):
        # The last part names a folder in the cache, which "." and ".." would lead out of.
        raise ConfigError(f"{redacted(url)}: a URL must not hold the parts . and ..; write it out")
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / digest
    # Several processes of a sweep begin in the same moment.
    with claimed(folder, WAIT_SECONDS, silent=5.0):
        try:
            return fetched(url, folder, step)
        except StorageError as error:
            known = found_before(folder)
            if known is None or not error.passing:
                raise
            warnings.warn(f"{error}; using {known}, which was fetched before", stacklevel=2)
            return known


def local_alone(url: str, steps: object) -> Path:
    """`local_model` for verbs that take several steps of a run.

    Raises  ConfigError if steps are named: a URL is one checkpoint; what `local_model` raises.
    """
    if steps is not None:
        raise ConfigError(
            f"--steps: {redacted(url)} is read as one checkpoint; give URL/step1000, or copy the"
            " run first"
        )
    return local_model(url)


def found_before(folder: Path) -> Path | None:
    """The model that was fetched into a folder of the cache last; None if there is none."""
    # A hidden folder is an export that did not come whole.
    places = [record.parent for record in folder.glob(f"*/[!.]*/{RECORD}")]
    for steps in folder.glob(f"*/*/{CHECKPOINTS}"):
        places += [steps / step_name(step) for step in complete_steps(steps)]
    return max(places, key=lambda place: place.stat().st_mtime, default=None)


def fetched(url: str, folder: Path, step: int | None) -> Path:
    """See `local_model`."""
    url = url.removesuffix(f"/{CHECKPOINTS}")
    base, wanted = split_step(url)
    store = ObjectStore(url)
    if has(store, COMPLETE):
        name = url.rpartition("/")[2]
        return fetch_checkpoint(store, "", home_of(base, folder) / CHECKPOINTS / name)
    if has(store, RECORD):
        return fetch_export(store, home_of(url, folder))
    run = Mirror(store, Path())
    if wanted is not None:
        around = Mirror(ObjectStore(base), Path())
        steps = around.steps()
        if wanted in steps:
            return newest_whole(around, [wanted], home_of(base, folder))
        if steps:
            raise CheckpointError(
                f"no checkpoint at {url}: step {wanted} is not there, or not completely; choose one"
                f" of {ranges_of(steps)}"
            )
    steps = run.steps()
    if not steps:
        raise CheckpointError(
            f"{url} holds no checkpoint, run or export of Castalia; give the URL of a mirror"
            " (checkpoint.mirror), URL/step1000, or that of a folder with export.json"
        )
    if step is not None and step in steps:
        steps = [step]
    return newest_whole(run, steps, home_of(url, folder))


def home_of(url: str, folder: Path) -> Path:
    """The place of a run or an export in the cache's folder of a URL."""
    around, _, name = url.rpartition("/")
    # A bucket has nothing around it.
    return folder / (around.rpartition("/")[2] or "models") / name


def newest_whole(run: Mirror, steps: list[int], folder: Path) -> Path:
    """The newest of `steps` that is whole, fetched; a damaged one is skipped with a warning."""
    first, *older = reversed(steps)
    try:
        return fetch_checkpoint(
            run.store, f"{run.place(first)}/", folder / CHECKPOINTS / step_name(first)
        )
    except DamagedCheckpointError as error:
        if not older:
            raise
        warnings.warn(f"{error}; using step {older[0]} instead", stacklevel=2)
    return newest_whole(run, older[::-1], folder)


def split_step(url: str) -> tuple[str, int | None]:
    """(URL of the run, step) of URL/step1000 or URL@1000; (URL, None) of another."""
    last = url.rpartition("/")[2]
    base = url.removesuffix(last).rstrip("/")
    if "@" in last:
        base, _, last = url.rpartition("@")
    found = WANTED_STEP.fullmatch(last)
    if found is None:
        return url, None
    return base.removesuffix(f"/{CHECKPOINTS}"), int(found[1])


def has(store: ObjectStore, name: str) -> bool:
    """Whether an object exists."""
    try:
        store.facts(name)
    except StorageError as error:
        if error.missing:
            return False
        raise
    return True


def fetch_checkpoint(store: ObjectStore, place: str, folder: Path) -> Path:
    """The step below `place`, empty or with a slash at its end, as a local folder.

    Raises  DamagedCheckpointError; StorageError.
    """
    hidden = folder.with_name(f".{folder.name}{FETCHED}")
    hidden.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, COMPLETE):
        (hidden / name).write_bytes(read_object(store, f"{place}{name}"))
    try:
        manifest = read_manifest(hidden)
        # Of the folder's own name: that of the hidden one says no step.
        fault = fault_of_table(manifest, folder.name)
        if fault is not None:
            raise DamagedCheckpointError(fault)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{store.url_of(place)} is damaged: {error}") from None
    seals = seals_needed(manifest)
    if is_same(folder, hidden, COMPLETE, seals):
        shutil.rmtree(hidden)
        return folder
    remove_others(hidden, {*seals, MANIFEST, COMPLETE})
    fetch_sealed(store, place, seals, hidden)
    return renamed(hidden, folder)


def seals_needed(manifest: Manifest) -> dict[str, Seal]:
    """The files that a reader of the model opens: all texts, and those with weights."""
    shards = {
        chunk.file
        for name, entry in manifest.tensors.items()
        if name.startswith(WEIGHTS)
        for chunk in entry.chunks
    }
    return {
        name: Seal(entry.sha256, entry.size)
        for name, entry in manifest.files.items()
        if name in shards or not name.endswith(SHARD)
    }


def fetch_export(store: ObjectStore, folder: Path) -> Path:
    """The export at the URL of the store, as a local folder.

    Raises  CheckpointError if its record is damaged; DamagedCheckpointError; StorageError.
    """
    hidden = folder.with_name(f".{folder.name}{FETCHED}")
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / RECORD).write_bytes(store.read(RECORD))
    seals = seals_of(read_record(hidden))
    if not seals:
        raise CheckpointError(
            f"{store.url_of(RECORD)} lists no hashes: it is of an older version; export the model"
            " again"
        )
    if is_same(folder, hidden, RECORD, seals):
        shutil.rmtree(hidden)
        return folder
    remove_others(hidden, {*seals, RECORD})
    fetch_sealed(store, "", seals, hidden)
    return renamed(hidden, folder)


def remove_others(hidden: Path, names: Set[str]) -> None:
    """Remove what an earlier fetch, which was broken off, left of another model at this URL: a
    reader would take its tokenizer for one of this model."""
    for path in list(hidden.rglob("*")):
        if path.is_file() and path.relative_to(hidden).as_posix() not in names:
            path.unlink()


def is_same(folder: Path, hidden: Path, mark: str, seals: Mapping[str, Seal]) -> bool:
    """Whether a folder of the cache is what was fetched from there, by its mark and sizes: whoever
    loads it compares the hashes."""
    try:
        if (folder / mark).read_bytes() != (hidden / mark).read_bytes():
            return False
        sizes = {name: (folder / name).stat().st_size for name in seals}
    except FileNotFoundError:
        return False
    return all(seal.size in (None, sizes[name]) for name, seal in seals.items())


def renamed(hidden: Path, folder: Path) -> Path:
    """Give a folder that is whole its name, in place of what was there."""
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(hidden, folder)
    return folder
