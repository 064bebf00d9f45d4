"""SHA-256 of a job's inputs, computed while they are read."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from castalia.core.files import CHUNK_BYTES
from castalia.corpus.extents import is_sequential
from castalia.corpus.inputs import InputFile


class InputHashes:
    """Hashes every input once.

    Sequential inputs are hashed from the bytes that pass by. Workers read other local files in
    pieces and out of order, so a thread of this process reads those again, beside the work.
    """

    def __init__(self, files: Sequence[InputFile]) -> None:
        self.files = files
        self.complete = False
        """Set when all inputs were read to their end."""
        self.stop = threading.Event()
        self.passing: dict[int, Any] = {}
        """Digests of sequential inputs, by number."""
        self.digests: dict[int, str] = {}
        self.thread = threading.Thread(target=self.hash_local_files, daemon=True)
        self.thread.start()

    def on_input_bytes(self, number: int, data: bytes) -> None:
        """Take the next bytes of a sequential input."""
        self.passing.setdefault(number, hashlib.sha256()).update(data)

    def hash_local_files(self) -> None:
        """On the thread: hash the inputs that nobody reads sequentially."""
        for number, file in enumerate(self.files):
            if file.remote or is_sequential(file):
                continue
            digest = hashlib.sha256()
            try:
                with open(file.path, "rb") as opened:
                    while not self.stop.is_set() and (chunk := opened.read(CHUNK_BYTES)):
                        digest.update(chunk)
            except OSError:  # reported by the worker that reads the file for its text
                continue
            if self.stop.is_set():
                return
            self.digests[number] = digest.hexdigest()

    def close(self) -> list[dict[str, Any]]:
        """Path, size and hash of every input; the hash is null if not all of it was read."""
        if not self.complete:
            self.stop.set()
        self.thread.join()
        digests = dict(self.digests)
        if self.complete:
            digests |= {number: digest.hexdigest() for number, digest in self.passing.items()}
        return [
            {"path": file.shown, "bytes": file.size, "sha256": digests.get(number)}
            for number, file in enumerate(self.files)
        ]
