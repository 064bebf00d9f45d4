"""The memory-mapped token file of GPT-NeoX: `PREFIX.bin` holds the tokens, `PREFIX.idx` the lengths and places.

Source  megatron/data/indexed_dataset.py of GPT-NeoX; the same bytes are read and written by Megatron-Core for
        integer dtypes (it swaps the codes of the two float types).
"""

import contextlib
import hashlib
import mmap
import operator
import os
import struct
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from castalia.core.errors import DataError
from castalia.core.files import cannot_write
from castalia.data.mapped import Buffer, MappedShards, fetch, map_file, view
from castalia.data.shards import base_of, find_shards

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of documents N, length D of doc_idx: 34 bytes, no padding."""
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f4", "f8", "u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCAB = 65500
"""Below this many ids the tools of GPT-NeoX write u16 (indexed_dataset.py:28-32)."""
CHECK_PIECE = 1 << 20
PIECE_TOKENS = 1 << 21
"""Tokens that are read at a time where a file is read from end to end."""
AT_ONCE = 1 << 24
"""Documents whose places are checked when a file is opened; of more, a run would wait for that."""


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The dtype that GPT-NeoX writes for a vocabulary: u16 below 65,500 ids, else i32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < SMALL_VOCAB else DTYPES[4]


def without_suffix(prefix: str | os.PathLike[str]) -> str:
    """A prefix that may carry .bin or .idx."""
    path: Path = file_pair(prefix)[0]
    return str(path)[: -len(".bin")]


def file_pair(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The `.bin` and `.idx` paths of a prefix, which may carry either suffix.

    Raises  DataError if it names a folder.
    """
    name = os.fspath(prefix)
    if not name or name.endswith(os.sep):
        raise DataError(
            f"{name or 'an empty name'}: names a folder, not files; put a name behind it: {name}corpus"
        )
    for suffix in (".bin", ".idx"):
        name = name.removesuffix(suffix) if name.endswith(suffix) else name
    return Path(name + ".bin"), Path(name + ".idx")


class IndexedDataset:
    """Documents of tokens on disk, memory-mapped read-only. Pickles as its path.

    Without a PREFIX.bin the shards that Pythia's tools cut it into (`PREFIX-00000-of-00082.bin` …) are read in place;
    a shard's name stands for its prefix. `shards` are their paths, empty for a whole file.

    `dataset[i]` is a 1-D view of document i, a slice gives a list of them; `sizes` (N,) int32 are tokens a document,
    `pointers` (N,) int64 byte places in the .bin, `doc_idx` (D,) int64 the document boundaries of GPT-NeoX's tools
    (not used in training: each of the N sequences counts as a document).

    Raises  DataError naming the file if one is missing, truncated, foreign or does not fit the other.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = file_pair(prefix)
        if not self.idx_path.exists():
            self.bin_path, self.idx_path = file_pair(base_of(os.fspath(prefix)))
        self.prefix = str(self.bin_path)[: -len(".bin")]
        self.open()

    def open(self) -> None:
        """Map both files and check that they are whole and belong together."""
        index = map_file(self.idx_path)
        code, count, boundaries = read_header(self.idx_path, index)
        self.dtype: np.dtype[Any] = DTYPES[code]
        self.sizes: NDArray[np.int32] = view(index, "<i4", count, HEADER.size)
        self.pointers: NDArray[np.int64] = view(index, "<i8", count, HEADER.size + 4 * count)
        self.doc_idx: NDArray[np.int64] = view(index, "<i8", boundaries, HEADER.size + 12 * count)
        self.shards = [] if self.bin_path.exists() else find_shards(self.prefix)
        self.buffer: Buffer = MappedShards(self.shards) if self.shards else map_file(self.bin_path)
        large = len(self.sizes) > AT_ONCE and self.sizes.min() >= 0
        self.check_places(len(self.sizes) - 1 if large else 0, len(self.sizes))

    def check_places(self, first: int, stop: int) -> None:
        """Documents [first, stop) lie within the .bin: all of them, before any is read, and of a very large file the
        last one, and each one where it is read."""
        for start in range(first, stop, CHECK_PIECE):
            end = min(start + CHECK_PIECE, stop)
            sizes, pointers = self.sizes[start:end].astype(np.int64), self.pointers[start:end]
            room = len(self.buffer) - sizes * self.dtype.itemsize
            bad = np.flatnonzero((sizes < 0) | (pointers < 0) | (pointers > room))
            if len(bad):
                i = start + int(bad[0])
                raise DataError(
                    f"{self.bin_path}: {len(self.buffer)} bytes, but {self.idx_path} places document {i}"
                    f" ({self.sizes[i]} tokens of {self.dtype.itemsize} bytes) at byte {self.pointers[i]}; "
                    "the files are truncated or do not belong together: copy or prepare both again"
                )

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[Any]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[Any] | list[NDArray[Any]]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Tokens [offset, offset + length) of document `index`; without a length, all from `offset` on.

        Shapes  (length,) of `dtype`, a read-only view of the file.
        Raises  IndexError if there is no such document or it has fewer tokens; DataError if it lies beyond the .bin.
        """
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.prefix}")
        size, offset = int(self.sizes[i]), operator.index(offset)
        length = size - offset if length is None else operator.index(length)
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"tokens [{offset}, {offset + length}) of document {i} in {self.prefix}, which has {size}"
            )
        place = int(self.pointers[i])
        if place < 0 or place + size * self.dtype.itemsize > len(self.buffer):
            self.check_places(i, i + 1)
        return view(self.buffer, self.dtype, length, place + offset * self.dtype.itemsize)

    def fetch(self, index: int, offset: int, length: int) -> None:
        """Let the kernel begin to read what `get` will be asked for."""
        place = int(self.pointers[index]) + offset * self.dtype.itemsize
        fetch(self.buffer, place, place + length * self.dtype.itemsize)

    def __getstate__(self) -> dict[str, str]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, str]) -> None:
        IndexedDataset.__init__(self, state["prefix"])

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}, {len(self)} documents, {self.dtype})"


def read_header(path: Path, index: bytes | mmap.mmap) -> tuple[int, int, int]:
    """Dtype code, number of documents and length of doc_idx of an .idx.

    Raises  DataError naming the file if these are not the bytes of a whole .idx.
    """
    if index[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise DataError(
            f"{path}: the old `cached` format (TNTIDX), not `mmap`; prepare the text again"
        )
    if len(index) < HEADER.size or index[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path}: not the index of a token file: its first bytes are {bytes(index[:9])!r}, expected {MAGIC!r}"
        )
    _, version, code, count, boundaries = HEADER.unpack(index[: HEADER.size])
    if version != VERSION:
        raise DataError(f"{path}: format version {version}, expected {VERSION}")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code {code}, expected one of {', '.join(map(str, DTYPES))}")
    expected = HEADER.size + 12 * count + 8 * boundaries
    if len(index) != expected and not has_modes(index, expected, count):
        raise DataError(
            f"{path}: {len(index)} bytes, but its header ({count} documents, {boundaries} boundaries) needs {expected};"
            " the file is truncated or damaged: copy or prepare it again"
        )
    return code, count, boundaries


def has_modes(index: bytes | mmap.mmap, expected: int, count: int) -> bool:
    """Whether what follows is Megatron-Core's multimodal array, one byte 0 or 1 a document, which we leave alone."""
    return 0 < count == len(index) - expected and max(index[expected:]) <= 1


class IndexedDatasetWriter:
    """Writes a token file document by document; both files appear at the end, whole, or not at all.

    Use it as a context manager, or call `close` (keep) or `abort` (leave nothing). `doc_idx` may be set before; None
    makes each sequence a document. `digest` is the SHA-256 of the tokens so far, in the end that of the .bin.

    Raises  DataError if a token does not fit the dtype; CastaliaError if the place cannot be written or is full.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DataError(
                f"a token file cannot hold {np.dtype(dtype)}; use {', '.join(map(str, DTYPES.values()))}"
            )
        self.bin_path, self.idx_path = file_pair(prefix)
        mark = uuid.uuid4().hex[:8]
        self.temporary = [
            p.with_name(f".{p.name}.{mark}.tmp") for p in (self.bin_path, self.idx_path)
        ]
        self.sizes = array("i")
        self.doc_idx: NDArray[np.int64] | None = None
        self.digest = hashlib.sha256()
        self.tokens = 0
        try:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.temporary[0], "wb", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self.bin_path, error) from error

    def add(self, tokens: ArrayLike) -> None:
        """Append one document, (n,) integers; n may be 0."""
        ids = np.asarray(tokens)
        if ids.ndim != 1:
            raise DataError(
                f"document {len(self.sizes)} for {self.bin_path}: expected one row of tokens, got {ids.shape}"
            )
        self.add_many(ids, [ids.size])

    def add_many(self, tokens: ArrayLike, sizes: ArrayLike) -> None:
        """Append documents that lie back to back: tokens (n,), sizes (m,) tokens of each, summing to n."""
        ids, counts = self.fitted(np.asarray(tokens)), np.asarray(sizes, dtype=np.int32)
        assert ids.ndim == 1 and ids.size == counts.sum(dtype=np.int64), (
            ids.shape,
            counts.sum(dtype=np.int64),
        )
        raw = ids.tobytes()
        try:
            self.file.write(raw)
        except OSError as error:
            self.abort()
            raise cannot_write(self.bin_path, error) from error
        self.digest.update(raw)
        self.sizes.frombytes(counts.tobytes())
        self.tokens += ids.size

    def fitted(self, ids: NDArray[Any]) -> NDArray[Any]:
        """`ids` in the file's dtype, unchanged in value."""
        if ids.size == 0 or ids.dtype == self.dtype:
            return ids.astype(self.dtype)
        if self.dtype.kind == "f":
            return ids.astype(self.dtype)
        if ids.dtype.kind not in "iu":
            raise DataError(
                f"document {len(self.sizes)} for {self.bin_path}: tokens must be integers, got {ids.dtype}"
            )
        low, high, room = int(ids.min()), int(ids.max()), np.iinfo(self.dtype)
        if low < room.min or high > room.max:
            raise DataError(
                f"document {len(self.sizes)} for {self.bin_path}: token {low if low < room.min else high} does not fit"
                f" {self.dtype} ({room.min} to {room.max}); write it as int32"
            )
        return ids.astype(self.dtype)

    def close(self) -> None:
        """Finish both files and give them their names; a second call does nothing."""
        if self.file.closed:
            return
        sizes = np.frombuffer(self.sizes, dtype=np.int32) if self.sizes else np.empty(0, np.int32)
        try:
            self.sync(self.file)
            with open(self.temporary[1], "wb") as index:
                write_index(index, self.dtype, len(sizes), lambda: [sizes], self.doc_idx)
                self.sync(index)
            give_names(list(zip(self.temporary, (self.bin_path, self.idx_path), strict=True)))
        except OSError as error:
            self.abort()
            raise cannot_write(self.bin_path, error) from error

    def sync(self, file: Any) -> None:
        """Everything written stands on the disk before the file gets its name."""
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(
            OSError
        ):  # the buffer that could not be written goes with the file
            self.file.close()
        for path in self.temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def give_names(written: Sequence[tuple[Path, Path]]) -> None:
    """Rename finished files over those of before. An .idx goes first and comes last: a kill in between leaves a token
    file without index, which nothing reads, rather than the new tokens under the index of the old."""
    for _, name in written:
        if name.suffix == ".idx":
            name.unlink(missing_ok=True)
    for path, name in sorted(written, key=lambda pair: pair[1].suffix == ".idx"):
        os.replace(path, name)


def write_index(
    file: IO[bytes],
    dtype: np.dtype[Any],
    count: int,
    sizes: Callable[[], Iterable[NDArray[np.int32]]],
    doc_idx: NDArray[np.int64] | None = None,
) -> None:
    """Write an .idx of `count` documents that lie back to back; `sizes` gives their tokens, any number at a time.

    `doc_idx` (D,) are the document boundaries; None makes each sequence a document.
    """
    boundaries = count + 1 if doc_idx is None else len(doc_idx)
    file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], count, boundaries))
    for some in sizes():
        file.write(some.astype("<i4").tobytes())
    place = 0
    for some in sizes():
        ends = place + np.cumsum(some, dtype="<i8") * dtype.itemsize
        file.write((ends - some.astype("<i8") * dtype.itemsize).tobytes())
        place = int(ends[-1]) if len(ends) else place
    if doc_idx is not None:
        file.write(doc_idx.astype("<i8").tobytes())
        return
    for start in range(0, boundaries, CHECK_PIECE):
        file.write(np.arange(start, min(start + CHECK_PIECE, boundaries), dtype="<i8").tobytes())


def require_tokens(dataset: IndexedDataset) -> None:
    """Refuse a file of floats, such as precomputed log-probabilities, where tokens are wanted.

    Raises  DataError naming the file.
    """
    if dataset.dtype.kind == "f":
        raise DataError(
            f"{dataset.prefix}: holds {dataset.dtype}, expected integers; these are not tokens"
        )
