"""export.json: the record of an export, and the check of its files by the hashes in it.

A record has the SHA-256 and the size of every other file, and a hash of itself. Older ones lack
sizes and their own hash.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any

from castalia.core.errors import CheckpointError
from castalia.core.files import sha256_of
from castalia.core.sealed import OWN_HASH, Seal, check_sealed, has_own_hash

RECORD = "export.json"
"""File with the origin, the config and the file hashes of an export."""
IMPORT_RECORD = "import.json"
"""The same beside the checkpoint of an imported model."""
HASHES = "files_sha256"
SIZES = "files_bytes"
"""Sizes by file. A record that has them has a hash of its own."""
UNREAD = ("README.md", "certificate.json")
"""Files for people, which no reader of the model opens; `castalia verify` checks them."""
BESIDE = ".safetensors"
"""Files that may be read while they are hashed: their reader stays within them, whatever is in
them. Pickles and the files of other programs' libraries are hashed first."""
Pending = list[Future[None]]
LATER: ContextVar[Pending | None] = ContextVar("hashes that are computed beside", default=None)


def file_facts(
    folder: Path, files: Iterable[Path], known: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of files of a folder, as its record has them.

    Takes   known: hashes that are known already, by path in the folder; the others are read.
    """
    known = known or {}
    named = {file.relative_to(folder).as_posix(): file for file in files}
    return {
        HASHES: {name: known.get(name) or sha256_of(file) for name, file in named.items()},
        SIZES: {name: file.stat().st_size for name, file in named.items()},
    }


def read_record(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """export.json of an export.

    Takes   check: whether it is compared with its own hash.
    Raises  CheckpointError if it is missing or damaged.
    """
    return sealed_record(folder / RECORD, {"to", "numbers", "model"}, check=check)


def sealed_record(path: Path, keys: Set[str], *, check: bool = True) -> dict[str, Any]:
    """The record of an export or an import, which has at least these keys.

    Raises  CheckpointError if it is missing or damaged.
    """
    try:
        text = path.read_bytes().decode()
        record = json.loads(text)
        assert keys <= record.keys()
        hashes = record.get(HASHES, {})
        assert all(is_inside(name) and isinstance(hashes[name], str) for name in hashes)
        assert isinstance(record.get(SIZES, {}), dict)
    except (OSError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} is not the record of an {path.stem} ({error!r}); {path.stem} the model again"
        ) from None
    # Sizes came with the hash: a record that lost it is no older one.
    has_hash = OWN_HASH in record or SIZES in record
    if check and has_hash and not has_own_hash(record, text):
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the {OWN_HASH} in it; {remedy_of(record)}"
        )
    return dict(record)


def is_inside(name: str) -> bool:
    """Whether the name of a file in a record means one in its folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def remedy_of(record: Mapping[str, Any]) -> str:
    """What to do about a damaged folder."""
    if "source" in record:
        return f"import it again from {record['source']}"
    return (
        f"export it again from {record.get('checkpoint', 'its checkpoint')}, or load it as it is"
        " with --no-verify (generate, eval, serve) or verify=False"
    )


def seals_of(record: Mapping[str, Any]) -> dict[str, Seal]:
    """Size and hash of each file that a record lists, by its path in the folder."""
    sizes = record.get(SIZES, {})
    return {name: Seal(digest, sizes.get(name)) for name, digest in record.get(HASHES, {}).items()}


def folder_of_record(path: Path) -> Path | None:
    """The export that `path` is, or is a part of: its .gguf or .pth file, or the folder of its
    step; None if it is in none."""
    if (path / RECORD).is_file():
        return path
    if (path.parent / RECORD).is_file():
        hashes = read_record(path.parent, check=False).get(HASHES, {})
        if any(PurePosixPath(name).parts[0] == path.name for name in hashes):
            return path.parent
    return None


def check_export(path: Path) -> None:
    """Compare every file of the export that `path` means with its record; other paths pass.

    Files that are read by Castalia alone wait in a block of `hashed_beside` for its end.
    Raises  CheckpointError naming the first file that is missing or changed.
    """
    folder = folder_of_record(path)
    if folder is None:
        return
    record = read_record(folder)
    if HASHES not in record:
        return
    seals = {folder / name: seal for name, seal in seals_of(record).items() if name not in UNREAD}
    require_files(seals, record)
    pending = LATER.get()
    beside = {file: seal for file, seal in seals.items() if file.suffix == BESIDE}
    if pending is None:
        beside = {}
    check_sealed({file: seals[file] for file in seals if file not in beside}, remedy_of(record))
    if pending is not None and beside:
        pool = ThreadPoolExecutor(1)
        pending.append(pool.submit(check_sealed, beside, remedy_of(record)))
        pool.shutdown(wait=False)


def require_files(files: Iterable[Path], record: Mapping[str, Any]) -> None:
    """Raises  CheckpointError if one is missing, or is a device or a pipe, which has no end."""
    for file in sorted(files):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, and {RECORD} lists it; {remedy_of(record)}")


def require_recorded(path: Path, files: Iterable[Path]) -> None:
    """Refuse weights that lie in an export and are not its own, such as a model.safetensors beside
    shards.

    Raises  CheckpointError naming the first.
    """
    folder = folder_of_record(path)
    hashes = {}
    if folder is not None:
        hashes = read_record(folder).get(HASHES, {})
    for file in files:
        if folder is None or not hashes or not file.is_relative_to(folder):
            continue
        if file.relative_to(folder).as_posix() not in hashes:
            raise CheckpointError(
                f"{file} is not a file of this export: {folder / RECORD} does not list it, and it"
                " would be read as its weights; move it away"
            )


@contextmanager
def hashed_beside() -> Iterator[None]:
    """Let exports that are opened in the block be hashed on other threads while it reads them.

    Raises  CheckpointError at the end of the block if a file is damaged, in place of an error that
            reading it led to.
    """
    pending: Pending = []
    token = LATER.set(pending)
    try:
        yield
    finally:
        LATER.reset(token)
        for check in pending:
            check.result()
