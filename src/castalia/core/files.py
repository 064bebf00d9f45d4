"""Local files: whole or not at all, and hashed."""

import errno
import hashlib
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from castalia.core.errors import CastaliaError, ConfigError

CHUNK_BYTES = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write says when there is no room."""


def several(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[str | os.PathLike[str]]:
    """Paths as a list, of one too: a string is no list of its letters."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


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


def cache_folder() -> Path:
    """Where this user keeps what can be made again: castalia's part of XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "castalia"


@contextmanager
def claimed(folder: Path, seconds: float = 45.0) -> Iterator[None]:
    """Hold `folder` for this process alone; the claim ends with the process, however it ends.

    Waits up to `seconds` for another that is ending. A file system without locks is taken as it is.
    Raises  ConfigError naming the process that holds the folder.
    """
    path, end = folder / ".claim", time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        told = False
        while not locked(file):
            file.seek(0)
            holder = file.read() or "another process"
            if time.monotonic() > end:
                raise ConfigError(f"{folder} is in use by {holder}; wait for its end, or stop it")
            if not told:
                print(
                    f"castalia: {folder} is in use by {holder}; waiting {seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def locked(file: TextIO) -> bool:
    """Whether the file is ours now."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
