"""Checkpoints: one chain of hashes from COMPLETE to every shard."""

from collections.abc import Iterator
from pathlib import Path

from castalia.checkpoint.load import verify
from castalia.checkpoint.manifest import (
    MANIFEST,
    fault_of_entry_file,
    read_manifest,
    reading,
)
from castalia.checkpoint.names import COMPLETE, STEP_NAME
from castalia.core.errors import CheckpointError
from castalia.integrity.kinds import CheckedFile, FolderKind, unlisted

BY = f"SHA-256 in {MANIFEST}"


def recognizes(path: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not."""
    return path.is_dir() and ((path / COMPLETE).exists() or bool(STEP_NAME.fullmatch(path.name)))


def check(path: Path) -> Iterator[CheckedFile]:
    """Every file of one checkpoint; the manifest first, since it speaks for the others."""
    if not (path / COMPLETE).exists():
        yield CheckedFile(
            str(path), f"{path} has no {COMPLETE}: its save did not end, and nothing reads it"
        )
        return
    try:
        with reading(path):
            manifest = read_manifest(path)
            yield CheckedFile(str(path / MANIFEST), None, f"SHA-256 in {COMPLETE}")
            faults = 0
            for name, entry in sorted(manifest.files.items()):
                fault = fault_of_entry_file(path / name, entry)
                faults += fault is not None
                yield CheckedFile(str(path / name), fault, BY, entry.size)
            if faults == 0:
                # Hashes alone do not show that the tensors are those of the manifest.
                for name in verify(path):
                    yield unlisted(path / name)
    except CheckpointError as error:
        yield CheckedFile(str(path / MANIFEST), str(error), f"SHA-256 in {COMPLETE}")


STEPS = FolderKind("checkpoint", recognizes, check)
