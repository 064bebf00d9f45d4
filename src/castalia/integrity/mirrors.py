"""Mirrors of runs: every object of every step, hashed as it comes and not kept."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from castalia.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from castalia.checkpoint.mirror import LOGS_RECORD, Mirror
from castalia.checkpoint.names import COMPLETE, step_name
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.sealed import Seal
from castalia.integrity.kinds import CheckedFile
from castalia.integrity.steps import BY
from castalia.storage import ObjectStore, StorageError

NAME = "mirror"
PIECE_BYTES = 8 << 20
"""Bytes that are fetched and hashed at a time."""


def check_mirror(url: str) -> Iterator[CheckedFile]:
    """Every file of the complete steps below a URL; goes on after a fault.

    Raises  ConfigError if there is none; StorageError if the store cannot be read.
    """
    mirror = Mirror(ObjectStore(url), Path())
    steps = mirror.steps()
    if not steps:
        raise ConfigError(f"{url} holds no complete step; give the URL of checkpoint.mirror")
    for step in steps:
        place = mirror.store.url_of(mirror.place(step))
        try:
            manifest = manifest_of(mirror, step)
        except (CheckpointError, StorageError) as error:
            if isinstance(error, StorageError) and not error.missing:
                raise
            yield CheckedFile(f"{place}/{MANIFEST}", f"{place} is damaged: {error}")
            continue
        yield CheckedFile(f"{place}/{MANIFEST}", None, f"SHA-256 in {COMPLETE}")
        for name, entry in sorted(manifest.files.items()):
            fault = fault_of_object(
                mirror.store, f"{mirror.place(step)}/{name}", Seal(entry.sha256, entry.size)
            )
            yield CheckedFile(f"{place}/{name}", fault, BY, entry.size)
    yield from check_logs(mirror)


def check_logs(mirror: Mirror) -> Iterator[CheckedFile]:
    """The logs, as the mirror's own record has them."""
    for name, entry in sorted(mirror.read_json(LOGS_RECORD).items()):
        # One that was on its way when a run was killed is either of two; the next start sends it.
        if len(entry) == 2:
            fault = fault_of_object(mirror.store, name, Seal(entry[1], entry[0]))
            yield CheckedFile(
                mirror.store.url_of(name), fault, f"SHA-256 in {LOGS_RECORD}", entry[0]
            )


def manifest_of(mirror: Mirror, step: int) -> Manifest:
    """The manifest of a step, compared with its COMPLETE."""
    # Read by the same code as that of a local step, which takes a folder.
    with TemporaryDirectory(prefix="castalia-") as parent:
        folder = Path(parent) / step_name(step)
        folder.mkdir()
        for name in (MANIFEST, COMPLETE):
            (folder / name).write_bytes(mirror.store.read(f"{mirror.place(step)}/{name}"))
        return read_manifest(folder)


def fault_of_object(store: ObjectStore, name: str, seal: Seal) -> str | None:
    """Why an object differs from its seal, or None."""
    url = store.url_of(name)
    try:
        size = store.facts(name).size
        if size != seal.size:
            return f"{url} is damaged: it has {size} bytes, expected {seal.size}"
        digest = hashlib.sha256()
        for start in range(0, size, PIECE_BYTES):
            digest.update(store.read_range(name, start, min(start + PIECE_BYTES, size)))
    except StorageError as error:
        if not error.missing:
            raise
        return str(error)
    if digest.hexdigest() != seal.sha256:
        return f"{url} is damaged: its SHA-256 is not the one of its save"
    return None
