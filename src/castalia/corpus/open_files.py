"""Open files of a work folder: its lock, and outputs that grow by whole parts."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from castalia.core.files import CHUNK_BYTES


def locked(folder: Path) -> IO[bytes]:
    """The lock of a work folder, held until it is closed.

    Raises  BlockingIOError if another process holds it; OSError if the folder cannot be written.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "wb")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_file_at(lock, folder / "lock"):
                return lock
        except OSError:
            lock.close()
            raise
        # A job that just ended removed the folder: this lock is of a deleted file.
        lock.close()


def is_file_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def opened(path: Path) -> IO[bytes]:
    """A file open for reading and writing, created if missing, unbuffered."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def read_chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes, or fewer at the end of the file, CHUNK_BYTES at a time."""
    while size and (chunk := file.read(min(size, CHUNK_BYTES))):
        size -= len(chunk)
        yield chunk


def append_file(source: IO[bytes], target: IO[bytes], digest: Any) -> None:
    """Append the rest of a file to an unbuffered one, and to a digest."""
    while chunk := memoryview(source.read(CHUNK_BYTES)):
        digest.update(chunk)
        while chunk:  # an unbuffered write may be partial
            chunk = chunk[target.write(chunk) :]
