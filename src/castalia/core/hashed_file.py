"""Files that are hashed while they are written.

A hash of the bytes that were handed to the system is one of the intended bytes: hashing a file
after it was written would also vouch for what the disk made of it.
"""

import hashlib
import io
import os
from typing import Any

from castalia.core.files import CHUNK_BYTES
from castalia.core.sealed import Seal

BLOCK = 1 << 24
"""Bytes hashed and written at a time; small enough to stay in the cache between the two."""


class HashedFile(io.BufferedWriter):
    """A new file for whoever writes to files, hashed from its beginning to its end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(open(path, "wb", buffering=0), CHUNK_BYTES)  # noqa: SIM115
        self.digest = hashlib.sha256()

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
        return view.nbytes

    def sync(self) -> Seal:
        """Bring the bytes to the disk; returns their hash and size."""
        self.flush()
        os.fsync(self.fileno())
        return Seal(self.digest.hexdigest(), self.tell())
