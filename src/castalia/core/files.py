"""Local files: atomic writes, hashes, and folders claimed by one process."""

import errno
import glob
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from castalia.core.errors import CastaliaError, ConfigError, DataError

CHUNK_BYTES = 1 << 22
"""Bytes read or copied at a time: 4 MiB."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write that finds no room: disk full, quota used up, file too large."""
POLL_SECONDS = 0.2
"""Time between two attempts to claim a folder. flock cannot wait with a deadline."""
CLAIM = ".claim"
"""The locked file of a claimed folder; it has the name of the holder."""


def several(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[str | os.PathLike[str]]:
    """One path or many, as a list. A string is one path, not an iterable of characters."""
    if isinstance(paths, str | os.PathLike):
        return [paths]
    return list(paths)


def files_in(folder: Path) -> list[Path]:
    """Every file of a folder and the folders in it, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256_of(*paths: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex SHA-256 of a local file, or of several one after the other, read 4 MiB at a time.

    Takes   on_bytes: called with the number of bytes that were just read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
    return digest.hexdigest()


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", *, synced: bool = True) -> Iterator[IO[Any]]:
    """Write a temporary file beside `path`; rename it to `path` on success, delete it on an error.

    Readers see the old file or the new one, never a part of it. Missing parent folders are created.
    Without `synced` that does not hold after a power cut, which may leave a file of another size.
    Raises  CastaliaError if the folder is not writable or the disk is full.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system. Hidden and unique,
    # so that two writers never share it.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            # Contents reach the disk before the name does, else a power cut leaves an empty `path`.
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # where the parent is a file, the error above says so
            temporary.unlink(missing_ok=True)


def on_disk(path: str | Path) -> None:
    """Force the content of a file, or the entries of a folder, to the disk.

    Raises  OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_temporaries(path: str | Path) -> bool:
    """Delete what killed writers of `path` left beside it; whether nobody writes it now.

    What a living process has locked stays, and everything where locks do not exist.
    """
    path = Path(path)
    idle = True
    for left in list(path.parent.glob(f".{glob.escape(path.name)}.????????.tmp")):
        try:
            with open(left, "r+b") as file:
                if lock_of(file):
                    left.unlink()
                else:
                    idle = False
        except OSError:  # a folder, somebody else's, or gone
            continue
    return idle


def read_json(path: Path, error: type[CastaliaError] = DataError) -> dict[str, Any]:
    """The JSON object in a file that somebody else may have written.

    Raises  `error` if it cannot be read or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason}") from None
    # Other bytes than UTF-8 are a ValueError, too; some thousand nested lists a RecursionError.
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: invalid JSON: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, sort_keys=False)
        file.write("\n")


def cannot_write(path: str | Path, error: OSError) -> CastaliaError:
    """The user's error for a failed write: the path, the reason and the remedy."""
    reason = error.strerror or str(error)
    remedy = "choose another place"
    if error.errno in FULL:
        remedy = "free space or choose another place"
    return CastaliaError(f"cannot write {path}: {reason}; {remedy}, then run the command again")


def cache_folder() -> Path:
    """Folder for files that can be rebuilt: `castalia` in XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "castalia"
    try:
        return Path.home() / ".cache" / "castalia"
    except RuntimeError:  # a user of a container, with neither HOME nor a name
        return Path(tempfile.gettempdir()) / f"castalia-{os.getuid()}"


@contextmanager
def claimed(folder: Path, seconds: float = 45.0, *, silent: float = 0.0) -> Iterator[None]:
    """Claim `folder` for this process; the claim ends with the process, even if it is killed.

    Waits up to `seconds` for the present holder to end, and says so after `silent` of them. A file
    system without locks grants every claim.
    Raises  ConfigError naming the process that holds the folder; CastaliaError if the folder cannot
            be written.
    """
    start = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Append mode creates the file without erasing the name of the present holder.
        opened = (folder / CLAIM).open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error
    with opened as file:
        announced = False
        while not locked(file):
            file.seek(0)
            holder = file.read() or "another process"
            waited = time.monotonic() - start
            if waited > seconds:
                raise ConfigError(f"{folder} is in use by {holder}; wait until it ends, or stop it")
            if not announced and waited >= silent:
                notice = f"castalia: {folder} is in use by {holder}; waiting {seconds:.0f} s"
                print(notice, file=sys.stderr, flush=True)
                announced = True
            # Whoever may wait in silence waits for something short.
            time.sleep(POLL_SECONDS if waited >= silent else POLL_SECONDS / 10)
        file.truncate(0)
        file.write(this_process())
        file.flush()
        yield


def this_process() -> str:
    """What a claim says of its holder."""
    return f"process {os.getpid()} on {platform.node()}"


def is_claimed(folder: Path) -> bool:
    """Whether a process holds `folder` by `claimed`; asking does not claim it."""
    try:
        # Shared: two that ask at once do not take each other for a holder.
        with open(folder / CLAIM, encoding="utf-8") as file:
            return not locked(file, shared=True)
    except OSError:  # never claimed
        return False


def locked(file: IO[Any] | int, *, shared: bool = False) -> bool:
    """Lock an open file or descriptor without waiting; False if another process holds the lock.

    Shared locks exclude exclusive ones only. The lock ends when the file is closed.
    True as well where locks do not exist: on Windows, and on file systems that refuse flock.
    """
    return lock_of(file, shared=shared) is not False


def lock_of(file: IO[Any] | int, *, shared: bool = False) -> bool | None:
    """As `locked`, but None where locks do not exist, so that nothing is known of other
    processes."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True
