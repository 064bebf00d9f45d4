"""Files that are hashed while they are written.

A hash of the bytes that were handed to the system is one of the intended bytes: hashing a file
after it was written would also vouch for what the disk made of it.
"""

import hashlib
import io
import os
from contextlib import suppress
from typing import Any

from castalia.core.sealed import Seal

BLOCK = 1 << 20
"""Bytes hashed and written at a time; small enough to stay in the cache between the two."""
BUFFER = 1 << 18
"""Bytes of small writes that are collected; less than a block, which then needs no copy."""
BEHIND = 1 << 24
"""Bytes after which the system is told to bring them to the disk."""


class HashedFile(io.BufferedWriter):
    """A new file for whoever writes to files, hashed from its beginning to its end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(open(path, "wb", buffering=0), BUFFER)  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.behind = 0
        """Bytes written since the system was last told to bring them to the disk."""

    def write(self, data: Any) -> int:
        """Hash and append bytes, or an array's; returns their number."""
        view = memoryview(data)
        if view.nbytes == 0:
            return 0
        view = view.cast("B")
        for start in range(0, view.nbytes, BLOCK):
            piece = view[start : start + BLOCK]
            self.digest.update(piece)
            super().write(piece)
            self.behind += piece.nbytes
            if self.behind >= BEHIND:
                self.start_writeback()
        return view.nbytes

    def start_writeback(self) -> None:
        """Let the disk begin with what was written, so that little is left to wait for in
        `sync`."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            begin = self.raw.tell() - self.behind
            # Linux starts to write pages that are not needed any more, and does not wait for them.
            # Until they are written it also keeps them.
            with suppress(OSError):  # a file system that takes no advice
                os.posix_fadvise(self.fileno(), max(begin, 0), self.behind, os.POSIX_FADV_DONTNEED)
        self.behind = 0

    def sync(self) -> Seal:
        """Bring the bytes to the disk; returns their hash and size."""
        self.flush()
        os.fsync(self.fileno())
        return Seal(self.digest.hexdigest(), self.tell())
