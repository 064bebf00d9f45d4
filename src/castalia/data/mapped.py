"""Memory-mapped bytes: one file, or several files read as if they were one."""

import errno
import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.core.errors import DataError


class Buffer(Protocol):
    """Read-only bytes on disk. `len` is their number; a slice with step 1 is a copy of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> bytes: ...

    def view(self, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
        """`count` numbers of `dtype` from byte `offset` on, (count,), read-only."""

    def read_at_random(self) -> None:
        """Turn read-ahead off, for reads of a few KB in random order."""

    def fetch(self, start: int, stop: int) -> None:
        """Start reading bytes [start, stop) in the background. Bytes past an end are ignored."""


class MappedFile:
    """The bytes of one file, mapped read-only.

    Raises  DataError if the file is missing or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.content = map_file(path)

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, places: slice) -> bytes:
        return self.content[places]

    def view(self, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
        """`count` numbers of `dtype` from byte `offset` on, without a copy."""
        if not count:  # numpy refuses an empty view at the end of a buffer
            return np.empty(0, dtype)
        return np.frombuffer(self.content, dtype, count, offset)

    def read_at_random(self) -> None:
        """Turn read-ahead off, which on some machines reads 8 MB for each row of 4 KB."""
        if isinstance(self.content, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            self.content.madvise(mmap.MADV_RANDOM)

    def fetch(self, start: int, stop: int) -> None:
        """Start reading bytes [start, stop) in the background.

        The disk then serves many such spans at once. Without it every page is requested only when
        the reader touches it, and the reader waits for each in turn.
        """
        start = max(start, 0)
        stop = min(stop, len(self.content))
        if start >= stop or not hasattr(mmap, "MADV_WILLNEED"):
            return
        if isinstance(self.content, mmap.mmap):
            first = start - start % mmap.PAGESIZE  # madvise needs the beginning of a page
            self.content.madvise(mmap.MADV_WILLNEED, first, stop - first)


class ShardSpan(NamedTuple):
    """Bytes [start, stop) of shard number `shard`."""

    shard: int
    start: int
    stop: int


class MappedShards:
    """The bytes of several files, one after the other, mapped read-only; nothing is joined on disk.

    Raises  DataError if a file is missing or unreadable.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shards = [MappedFile(path) for path in paths]
        lengths = [len(shard) for shard in self.shards]
        self.starts: NDArray[np.int64] = np.cumsum([0, *lengths], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: slice) -> bytes:
        start, stop, step = places.indices(len(self))
        assert step == 1, step
        spans = self.spans(start, stop)
        return b"".join(self.shards[span.shard][span.start : span.stop] for span in spans)

    def spans(self, start: int, stop: int) -> list[ShardSpan]:
        """The non-empty spans of the shards that make up bytes [start, stop), in order."""
        spans = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            begin = int(self.starts[shard])
            end = min(int(self.starts[shard + 1]), stop)
            if start < end:  # false for an empty shard
                spans.append(ShardSpan(shard, start - begin, end - begin))
                start = end
            shard += 1
        return spans

    def view(self, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
        """`count` numbers of `dtype` from byte `offset` on; a copy if they cross a shard border."""
        if not count:
            return np.empty(0, dtype)
        size = count * np.dtype(dtype).itemsize
        spans = self.spans(offset, offset + size)
        if len(spans) == 1:
            return self.shards[spans[0].shard].view(dtype, count, spans[0].start)
        return np.frombuffer(self[offset : offset + size], dtype, count)

    def read_at_random(self) -> None:
        """Turn read-ahead off in every shard."""
        for shard in self.shards:
            shard.read_at_random()

    def fetch(self, start: int, stop: int) -> None:
        """Start reading bytes [start, stop) in the background, in each shard that they touch."""
        for span in self.spans(max(start, 0), min(stop, len(self))):
            self.shards[span.shard].fetch(span.start, span.stop)


def map_file(path: Path) -> bytes | mmap.mmap:
    """Map a file read-only. An empty file, which cannot be mapped, is empty bytes.

    Raises  DataError if the file is missing or unreadable.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            # The mapping keeps the file open after this block.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; a token file is a pair PREFIX.bin and PREFIX.idx"
            f"{not_a_prefix(path)}"
        ) from None
    except OSError as error:
        hint = ""
        if error.errno == errno.EMFILE:
            if allow_more_files():
                return map_file(path)
            hint = "; raise the limit on open files with `ulimit -n`"
        raise DataError(f"{path}: cannot be read: {error.strerror or error}{hint}") from error


def allow_more_files() -> bool:
    """Raise this process's limit on open files to its maximum; False if it is there already.

    Each token file needs two. The usual limit of 1,024 protects programs that use `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def not_a_prefix(path: Path) -> str:
    """What stands at the prefix of a missing token file, where it is a text or a folder."""
    prefix = path.with_suffix("")
    if prefix.is_file():
        return f"; {prefix} is no token file, and `castalia prepare {prefix}` makes one of a text"
    inner = sorted(file.with_suffix("") for file in prefix.glob("*.idx"))
    if inner:
        return f"; {prefix} is a folder, in which is {inner[0]}"
    return ""
