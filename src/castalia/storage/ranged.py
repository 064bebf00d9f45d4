"""`RangedFile`: a large object read by range, through blocks that are kept on the local disk.

FOLDER/0000/00000123     one block and its CRC-32; written under another name and renamed, so that
                         several ranks and workers share the folder. A block that was deleted is
                         fetched again.
"""

import itertools
import os
import random
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.core.background import Background
from castalia.core.files import cannot_write
from castalia.core.private_cache import ABANDONED_SECONDS
from castalia.storage.faults import StorageError
from castalia.storage.objects import Facts, ObjectStore

BLOCK_BYTES = 1 << 17
"""Bytes of a block. Rows of a shuffled order lie anywhere, so that a block is mostly read for one
row of some KB; each request costs as much time as half a MB."""
REQUEST_BYTES = 4 << 20
"""Most bytes of one request, where blocks in a row are missing."""
REQUESTS = 16
"""Requests at the same time."""
AHEAD_BYTES = 1 << 20
"""Bytes that are fetched beyond a read that goes on where the last one ended."""
CHECK_SECONDS = 30.0
"""Time after which size and tag of the object are compared again before more of it is fetched."""
CRC_BYTES = 4
SWEPT_SHARE = 8
"""The folder is measured after each so many parts of its limit that were written."""
KEPT_SHARE = 0.9
"""Share of the limit that is left when blocks are deleted."""
Coming = Future[dict[int, bytes]]
"""Blocks of one request, by number."""


class RangedFile:
    """The bytes of one object; `len` is their number, a slice with step 1 a copy of them.

    facts   size and tag that the object must have.
    limit   most bytes of blocks in the folder, about; None keeps all.
    Raises  StorageError where bytes cannot be fetched, or the object is another one by now.
    """

    def __init__(
        self, store: ObjectStore, name: str, facts: Facts, folder: Path, limit: int | None = None
    ) -> None:
        self.store = store
        self.name = name
        self.facts = facts
        self.folder = folder
        self.limit = limit
        self.lock = threading.Lock()
        self.coming: dict[int, Coming] = {}
        """Blocks that are being fetched, by number."""
        self.whole: set[int] = set()
        """Blocks whose checksum this process has compared."""
        self.pool = Background(REQUESTS, "ranges")
        self.checked_at = float("-inf")
        self.fault: str | None = None
        """How the object was changed, once that was noticed."""
        self.end = -1
        """Where the last read ended."""
        # Ranks write at the same rate: they should not all measure the folder at the same time.
        # Not by the generator of the process, which belongs to the run.
        self.written = int(random.SystemRandom().uniform(0, (limit or 0) / SWEPT_SHARE))
        """Bytes since the folder was measured."""

    def __repr__(self) -> str:
        return f"RangedFile({self.store.url_of(self.name)!r}, {self.facts.size:,} bytes)"

    def __len__(self) -> int:
        return self.facts.size

    def __getitem__(self, places: slice) -> bytes:
        start, stop, step = places.indices(len(self))
        assert step == 1, step
        return self.read(start, stop)

    def view(self, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
        """`count` numbers of `dtype` from byte `offset` on, (count,), read-only."""
        if not count:
            return np.empty(0, dtype)
        return np.frombuffer(self.read(offset, offset + count * np.dtype(dtype).itemsize), dtype)

    def read_at_random(self) -> None:
        """Nothing: a read that does not go on where the last one ended fetches no more than it
        needs."""

    def fetch(self, start: int, stop: int) -> None:
        """Begin to fetch bytes [start, stop) in the background; bytes past an end are ignored."""
        self.request(self.blocks(max(start, 0), min(stop, len(self))))

    def blocks(self, start: int, stop: int) -> range:
        """The blocks that bytes [start, stop) lie in."""
        return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES) if stop > start else 0)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which the object has."""
        if stop <= start:
            return b""
        wanted = self.blocks(start, stop)
        if start == self.end:
            # Read from end to end: the next requests are on their way meanwhile.
            self.fetch(stop, stop + AHEAD_BYTES)
        self.end = stop
        coming = self.request(wanted)
        pieces = []
        for block in wanted:
            begin = block * BLOCK_BYTES
            first = max(start - begin, 0)
            last = min(stop - begin, BLOCK_BYTES)
            pieces.append(self.piece(block, first, last, coming.get(block)))
        return b"".join(pieces)

    def piece(self, block: int, first: int, stop: int, coming: Coming | None) -> bytes:
        """Bytes [first, stop) of a block, which is on its way or, without `coming`, on the disk."""
        while coming is None:
            body = self.from_disk(block, first, stop)
            if body is not None:
                return body
            # Deleted by another process to make room, or damaged.
            coming = self.request([block]).get(block)
        return coming.result()[block][first:stop]

    def from_disk(self, block: int, first: int, stop: int) -> bytes | None:
        """Bytes [first, stop) of a block in the folder; None if it is missing or damaged."""
        path = self.path_of(block)
        try:
            with open(path, "rb") as file:
                if block in self.whole:
                    return os.pread(file.fileno(), stop - first, first)
                content = file.read()
        except FileNotFoundError:
            return None
        body = content[:-CRC_BYTES]
        # A power cut may leave a name without its bytes.
        if len(body) != self.size_of(block) or content[-CRC_BYTES:] != checksum(body):
            path.unlink(missing_ok=True)
            return None
        self.whole.add(block)
        return body[first:stop]

    def path_of(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"{block // 1000:04d}" / f"{block:08d}"

    def size_of(self, block: int) -> int:
        """Bytes of a block; the last one is shorter."""
        return min(BLOCK_BYTES, len(self) - block * BLOCK_BYTES)

    def request(self, blocks: Sequence[int]) -> dict[int, Coming]:
        """Begin to fetch those blocks that are neither here nor on their way; all that are on their
        way by now."""
        with self.lock:
            missing = [
                block
                for block in blocks
                if block not in self.coming and not self.path_of(block).exists()
            ]
            for group in runs_of(missing):
                future = self.pool.submit(self.pull, group)
                for block in group:
                    self.coming[block] = future
            return {block: self.coming[block] for block in blocks if block in self.coming}

    def pull(self, group: range) -> dict[int, bytes]:
        """Fetch blocks in a row and write them to the folder; their contents."""
        try:
            self.require_same()
            start = group.start * BLOCK_BYTES
            stop = min(group.stop * BLOCK_BYTES, len(self))
            content = self.store.read_range(self.name, start, stop)
            # Another thread may have noticed a change meanwhile.
            self.require_same()
            contents = {}
            for number, block in enumerate(group):
                body = content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                contents[block] = body
                self.write(block, body)
            self.make_room(len(content))
            return contents
        finally:
            # Whoever waits has the future. Kept here, blocks that nobody reads would fill the
            # memory, and an old failure would meet a read after the server is back.
            with self.lock:
                for block in group:
                    self.coming.pop(block, None)

    def write(self, block: int, body: bytes) -> None:
        """Keep a block."""
        path = self.path_of(block)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(body + checksum(body))
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cannot_write(path, error) from error

    def require_same(self) -> None:
        """Compare size and tag of the object with those that it had, now and then.

        Raises  StorageError if it is another one; then no block of the folder is left.
        """
        if self.fault is not None:
            raise StorageError(self.fault)
        now = time.monotonic()
        if now - self.checked_at < CHECK_SECONDS:
            return
        found = self.store.facts(self.name)
        if found != self.facts:
            self.fault = changed(self.store.url_of(self.name), self.facts, found)
            # What was fetched since the last comparison may be of the other object, and would be
            # taken for a part of the first one when that is restored.
            shutil.rmtree(self.folder, ignore_errors=True)
            raise StorageError(self.fault)
        self.checked_at = now

    def make_room(self, nbytes: int) -> None:
        """Delete the oldest blocks where the folder is larger than its limit."""
        if self.limit is None:
            return
        with self.lock:
            self.written += nbytes
            if self.written * SWEPT_SHARE < self.limit:
                return
            self.written = 0
        kept = []
        # Another thread or process may be writing, unless it was killed long ago.
        begun = time.time() - ABANDONED_SECONDS
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another process makes room, too
                at = path.stat()
                if not path.name.startswith(".") or at.st_mtime < begun:
                    kept.append((at.st_mtime, at.st_size, path))
        total = sum(size for _, size, _ in kept)
        if total <= self.limit:
            return
        for _, size, path in sorted(kept):
            path.unlink(missing_ok=True)
            total -= size
            if total <= KEPT_SHARE * self.limit:
                return


def checksum(body: bytes) -> bytes:
    """CRC-32 of a block, 4 bytes."""
    return zlib.crc32(body).to_bytes(CRC_BYTES, "little")


def runs_of(blocks: Iterable[int]) -> Iterable[range]:
    """Ascending blocks as runs of at most REQUEST_BYTES."""
    most = REQUEST_BYTES // BLOCK_BYTES
    for _, run in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in run]
        for first in range(0, len(numbers), most):
            part = numbers[first : first + most]
            yield range(part[0], part[-1] + 1)


def changed(url: str, before: Facts, now: Facts) -> str:
    """The sentence about an object that is another one by now."""
    if before.size != now.size:
        what = f"it had {before.size} bytes and has {now.size}"
    else:
        what = f"its tag was {before.tag} and is {now.tag}"
    return f"{url} was changed since it was first read: {what}; restore it"
