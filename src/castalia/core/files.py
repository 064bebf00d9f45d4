"""Local files: whole or not at all, and hashed."""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from castalia.core.errors import CastaliaError

CHUNK_BYTES = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write says when there is no room."""


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a local file's bytes, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; rename it over `path` when the block ends well, remove it when not.

    Raises  CastaliaError if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # a folder that is a file: the error above says so
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, sort_keys=False)
        file.write("\n")


def cannot_write(path: str | Path, error: OSError) -> CastaliaError:
    """The error for a user when a write fails: the reason, the path, and what to do."""
    reason = error.strerror or str(error)
    remedy = "free space or choose another place" if error.errno in FULL else "choose another place"
    return CastaliaError(f"cannot write {path}: {reason}; {remedy}, then run the command again")
