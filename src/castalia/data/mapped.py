"""Bytes on disk, memory-mapped: one file, or the shards of one cut anywhere, read as if they were whole."""

import errno
import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.core.errors import DataError


class MappedShards:
    """The bytes of several files as one buffer, mapped read-only; nothing is joined on disk.

    `len` is the sum of their bytes, a slice (step 1) is a copy as `bytes`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts = [map_file(path) for path in paths]
        self.starts: NDArray[np.int64] = np.cumsum(
            [0, *(len(part) for part in self.parts)], dtype=np.int64
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: slice) -> bytes:
        start, stop, step = places.indices(len(self))
        assert step == 1, step
        return b"".join(self.parts[i][a:b] for i, a, b in self.stretches(start, stop))

    def stretches(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Bytes [start, stop) as (shard, first byte in it, end in it), in order; no empty ones."""
        found = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            begin, end = int(self.starts[shard]), min(int(self.starts[shard + 1]), stop)
            if start < end:
                found.append((shard, start - begin, end - begin))
                start = end
            shard += 1
        return found

    def view(self, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
        """`count` numbers of `dtype` at byte `offset`: a view, or a read-only copy where a border lies in between."""
        size = count * np.dtype(dtype).itemsize
        stretches = self.stretches(offset, offset + size)
        if len(stretches) == 1:
            shard, first, _ = stretches[0]
            return np.frombuffer(self.parts[shard], dtype, count, first)
        return np.frombuffer(self[offset : offset + size], dtype, count)


Buffer = bytes | mmap.mmap | MappedShards


def view(buffer: Buffer, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
    """`count` numbers of `dtype` at byte `offset`, without a copy unless they lie across a border of shards."""
    if not count:
        return np.empty(0, dtype)
    if isinstance(buffer, MappedShards):
        return buffer.view(dtype, count, offset)
    return np.frombuffer(buffer, dtype, count, offset)


def read_at_random(buffer: Buffer) -> None:
    """Tell the kernel that reads of a few KB will come in no order: it then fetches what is asked and no more.

    Otherwise it reads ahead, on some machines 8 MB for each row of 4 KB.
    """
    for part in buffer.parts if isinstance(buffer, MappedShards) else [buffer]:
        if isinstance(part, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            part.madvise(mmap.MADV_RANDOM)


def fetch(buffer: Buffer, start: int, stop: int) -> None:
    """Let the kernel begin to read bytes [start, stop), so that the disk works on many such stretches at once, and not
    on one page after the other, each of which whoever reads it waits for. Bytes that are not there are left out."""
    start, stop = max(start, 0), min(stop, len(buffer))
    if isinstance(buffer, MappedShards):
        for shard, begin, end in buffer.stretches(start, stop):
            fetch(buffer.parts[shard], begin, end)
    elif isinstance(buffer, mmap.mmap) and start < stop and hasattr(mmap, "MADV_WILLNEED"):
        first = start - start % mmap.PAGESIZE
        buffer.madvise(mmap.MADV_WILLNEED, first, stop - first)


def map_file(path: Path) -> bytes | mmap.mmap:
    """The file's bytes, mapped read-only; an empty file cannot be mapped and is empty bytes.

    Raises  DataError if it is missing or unreadable.
    """
    try:
        return mapped(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; a token file is a pair PREFIX.bin and PREFIX.idx"
        ) from None
    except OSError as error:
        if error.errno == errno.EMFILE and allow_more_files():
            return map_file(path)
        hint = (
            "; `ulimit -n` sets how many files a process may have open"
            if error.errno == errno.EMFILE
            else ""
        )
        raise DataError(f"{path}: cannot be read: {error.strerror or error}{hint}") from error


def mapped(path: Path) -> bytes | mmap.mmap:
    """The mapping itself, which holds the file open."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def allow_more_files() -> bool:
    """Raise this process's limit on open files to the most that it may have; False if it stood there before.

    Each token file takes two, and the usual limit of 1,024 is meant for programs that wait on files with `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True
