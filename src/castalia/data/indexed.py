"""GPT-NeoX's memory-mapped token file: `PREFIX.bin` holds the tokens, `PREFIX.idx` their lengths
and places.

Source  megatron/data/indexed_dataset.py of GPT-NeoX. Megatron-Core reads and writes the same bytes
        for integer dtypes (it swaps the codes of the two float types).
"""

import contextlib
import hashlib
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
from castalia.core.files import cannot_write, clear_temporaries, lock_of
from castalia.core.hashed_file import HashedFile
from castalia.core.sealed import Seal
from castalia.data.mapped import Buffer, MappedFile, MappedShards
from castalia.data.seals import entry
from castalia.data.shards import base_of, find_shards
from castalia.storage.twins import remote_bin, twin
from castalia.storage.urls import is_url

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of documents N, length D of doc_idx: 34 bytes without
padding."""
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f4", "f8", "u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCAB = 65500
"""Below this many ids GPT-NeoX's tools write uint16 (indexed_dataset.py:28-32)."""
CHECK_BLOCK = 1 << 20
"""Documents, or tokens, checked at a time: numpy works at full speed, in a few MB of memory."""
TOKENS_AT_A_TIME = 1 << 21
"""Tokens read at a time where a file is read from end to end."""
CHECKED_AT_OPENING = 1 << 24
"""Most documents whose places are all checked when a file is opened. With more, opening would take
seconds."""
WRITE_BUFFER = 1 << 20
"""Bytes collected before a write."""
LEFT = (".idx", ".json", ".documents.parquet")
"""What a killed writer may leave temporary files of, beside the .bin."""


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The dtype that GPT-NeoX writes for a vocabulary: uint16 below 65,500 ids, else int32."""
    if vocab_size is not None and vocab_size < SMALL_VOCAB:
        return np.dtype("<u2")
    return np.dtype("<i4")


def without_suffix(prefix: str | os.PathLike[str]) -> str:
    """A prefix without the .bin or .idx that it may carry."""
    path: Path = file_pair(prefix)[0]
    return str(path)[: -len(".bin")]


def file_pair(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The `.bin` and `.idx` paths of a prefix, which may carry either suffix.

    Raises  DataError if it names a folder.
    """
    name = os.fspath(prefix)
    if not name or name.endswith(os.sep):
        raise DataError(
            f"{name or 'an empty name'}: names a folder, expected a prefix of files, such as"
            f" {name}corpus"
        )
    for suffix in (".bin", ".idx"):
        name = name.removesuffix(suffix)
    return Path(name + ".bin"), Path(name + ".idx")


class IndexedDataset:
    """Documents of tokens on disk, memory-mapped read-only. Pickles as its path.

    Without a PREFIX.bin, the shards that Pythia's tools cut it into (`PREFIX-00000-of-00082.bin` …)
    are read in place, and the name of a shard stands for its prefix. `shards` are their paths,
    empty for a single file. Of a URL the tokens are read by range, and `prefix` is local.

    `dataset[i]` is a 1-D view of document i; a slice gives a list of them.
    Shapes  sizes (N,) int32, tokens per document; pointers (N,) int64, byte places in the .bin;
            doc_idx (D,) int64, the document boundaries of GPT-NeoX's tools, which training does not
            use: each of the N sequences counts as a document.
    Raises  DataError naming the file, if one is missing, truncated, foreign or does not match the
            other.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        if is_url(prefix):
            prefix = twin(os.fspath(prefix))
        self.bin_path, self.idx_path = file_pair(prefix)
        if not self.idx_path.exists():
            self.bin_path, self.idx_path = file_pair(base_of(os.fspath(prefix)))
        self.prefix = str(self.bin_path)[: -len(".bin")]
        self.open()

    def open(self) -> None:
        """Map both files and check that they are whole and belong together."""
        index = MappedFile(self.idx_path)
        code, count, boundaries = read_header(self.idx_path, index)
        self.dtype: np.dtype[Any] = DTYPES[code]
        self.sizes: NDArray[np.int32] = index.view("<i4", count, HEADER.size)
        self.pointers: NDArray[np.int64] = index.view("<i8", count, HEADER.size + 4 * count)
        self.doc_idx: NDArray[np.int64] = index.view("<i8", boundaries, HEADER.size + 12 * count)
        self.shards: list[Path] = []
        self.buffer: Buffer
        remote = None if self.bin_path.exists() else remote_bin(self.prefix)
        if remote is not None:
            self.buffer = remote
        elif self.bin_path.exists():
            self.buffer = MappedFile(self.bin_path)
        else:
            self.shards = find_shards(self.prefix)
            # Without shards, mapping the missing .bin raises the error.
            self.buffer = MappedShards(self.shards) if self.shards else MappedFile(self.bin_path)
        # The last document finds a truncated .bin. `get` checks each of the others when it is read.
        large = count > CHECKED_AT_OPENING and self.sizes.min() >= 0
        self.check_places(count - 1 if large else 0, count)

    def check_places(self, first: int, stop: int) -> None:
        """Check that documents [first, stop) lie within the .bin.

        Raises  DataError naming the first that does not.
        """
        for start in range(first, stop, CHECK_BLOCK):
            end = min(start + CHECK_BLOCK, stop)
            sizes = self.sizes[start:end].astype(np.int64)
            pointers = self.pointers[start:end]
            last_place = len(self.buffer) - sizes * self.dtype.itemsize
            outside = np.flatnonzero((sizes < 0) | (pointers < 0) | (pointers > last_place))
            if len(outside):
                i = start + int(outside[0])
                raise DataError(
                    f"{self.bin_path}: {len(self.buffer)} bytes, but {self.idx_path} places"
                    f" document {i} ({self.sizes[i]} tokens of {self.dtype.itemsize} bytes) at byte"
                    f" {self.pointers[i]}; the files are truncated or do not belong together: copy"
                    " or prepare both again"
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
        """Tokens [offset, offset + length) of document `index`, by default to its end.

        Shapes  (length,) of `dtype`, a read-only view of the file.
        Raises  IndexError if the document does not exist or has fewer tokens; DataError if it lies
                beyond the .bin.
        """
        document = operator.index(index)
        if document < 0:
            document += len(self)
        if not 0 <= document < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.prefix}")
        size = int(self.sizes[document])
        offset = operator.index(offset)
        if length is None:
            length = size - offset
        length = operator.index(length)
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"tokens [{offset}, {offset + length}) of document {document} in {self.prefix},"
                f" which has {size}"
            )
        place = int(self.pointers[document])
        width = self.dtype.itemsize
        if place < 0 or place + size * width > len(self.buffer):
            self.check_places(document, document + 1)
        return self.buffer.view(self.dtype, length, place + offset * width)

    def fetch(self, index: int, offset: int, length: int) -> None:
        """Start reading from disk what `get` will be asked for."""
        width = self.dtype.itemsize
        place = int(self.pointers[index]) + offset * width
        self.buffer.fetch(place, place + length * width)

    def __getstate__(self) -> dict[str, str]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, str]) -> None:
        IndexedDataset.__init__(self, state["prefix"])

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}, {len(self)} documents, {self.dtype})"


def read_header(path: Path, index: Buffer) -> tuple[int, int, int]:
    """Dtype code, number of documents and length of doc_idx of an .idx.

    Raises  DataError naming the file, if it is not a whole .idx.
    """
    if index[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise DataError(
            f"{path}: in the old `cached` format (TNTIDX), expected `mmap`; prepare the text again"
        )
    if len(index) < HEADER.size or index[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path}: not the index of a token file: its first bytes are {index[:9]!r}, expected"
            f" {MAGIC!r}"
        )
    _, version, code, count, boundaries = HEADER.unpack(index[: HEADER.size])
    if version != VERSION:
        raise DataError(f"{path}: format version {version}, expected {VERSION}")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code {code}, expected one of {', '.join(map(str, DTYPES))}")
    expected = HEADER.size + 12 * count + 8 * boundaries
    if len(index) != expected and not has_modes(index, expected, count):
        raise DataError(
            f"{path}: {len(index)} bytes, but its header ({count} documents, {boundaries}"
            f" boundaries) needs {expected}; the file is truncated or damaged: copy or prepare it"
            " again"
        )
    return code, count, boundaries


def has_modes(index: Buffer, expected: int, count: int) -> bool:
    """Whether the rest is Megatron-Core's multimodal array, one byte 0 or 1 per document."""
    return 0 < count == len(index) - expected and max(index[expected:]) <= 1


class IndexedDatasetWriter:
    """Writes a token file document by document; both files appear at the end, whole, or not at all.

    Use it as a context manager, or call `close` (keep) or `abort` (leave nothing). `doc_idx` may be
    set before closing; None makes each sequence a document. `digest` is the SHA-256 of the tokens
    so far, after `close` that of the .bin; `entries` are then those of both files for a record.

    Raises  DataError if a token does not fit the dtype; CastaliaError if the files cannot be
            written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DataError(
                f"a token file cannot hold dtype {np.dtype(dtype)}; choose one of"
                f" {', '.join(map(str, DTYPES.values()))}"
            )
        self.bin_path, self.idx_path = file_pair(prefix)
        mark = uuid.uuid4().hex[:8]
        self.temporary_bin = self.bin_path.with_name(f".{self.bin_path.name}.{mark}.tmp")
        self.temporary_idx = self.idx_path.with_name(f".{self.idx_path.name}.{mark}.tmp")
        # An array of C ints: 4 bytes per document, where a list would take 36.
        self.sizes = array("i")
        self.doc_idx: NDArray[np.int64] | None = None
        self.digest = hashlib.sha256()
        self.entries: dict[str, dict[str, Any]] = {}
        self.tokens = 0
        try:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            # A killed job leaves as much as it had written, and nobody else would remove it.
            if clear_temporaries(self.bin_path):
                for suffix in LEFT:
                    clear_temporaries(self.bin_path.with_suffix(suffix))
            self.file = open(self.temporary_bin, "wb", buffering=WRITE_BUFFER)  # noqa: SIM115
            # While it is open it is ours.
            lock_of(self.file)
        except OSError as error:
            raise cannot_write(self.bin_path, error) from error

    def add(self, tokens: ArrayLike) -> None:
        """Append one document, (n,) integers; n may be 0."""
        ids = np.asarray(tokens)
        if ids.ndim != 1:
            raise DataError(
                f"document {len(self.sizes)} for {self.bin_path}: expected tokens of shape (n,),"
                f" got {ids.shape}"
            )
        self.add_many(ids, [ids.size])

    def add_many(self, tokens: ArrayLike, sizes: ArrayLike) -> None:
        """Append consecutive documents: tokens (n,), sizes (m,) tokens of each, summing to n."""
        ids = self.fitted(np.asarray(tokens))
        counts = np.asarray(sizes, dtype=np.int32)
        total = counts.sum(dtype=np.int64)
        assert ids.ndim == 1 and ids.size == total, (ids.shape, total)
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
        """`ids` in the file's dtype, unchanged in value.

        Raises  DataError if they are not integers, or one does not fit.
        """
        if ids.size == 0 or ids.dtype == self.dtype or self.dtype.kind == "f":
            return ids.astype(self.dtype)
        if ids.dtype.kind not in "iu":
            raise DataError(
                f"document {len(self.sizes)} for {self.bin_path}: tokens must be integers, got"
                f" {ids.dtype}"
            )
        limits = np.iinfo(self.dtype)
        for token in (int(ids.min()), int(ids.max())):
            if not limits.min <= token <= limits.max:
                raise DataError(
                    f"document {len(self.sizes)} for {self.bin_path}: token {token} does not fit"
                    f" {self.dtype} ({limits.min} to {limits.max}); write it as int32"
                )
        return ids.astype(self.dtype)

    def close(self) -> None:
        """Finish both files and rename them; a second call does nothing."""
        if self.file.closed:
            return
        sizes = np.frombuffer(self.sizes, dtype=np.int32) if self.sizes else np.empty(0, np.int32)
        try:
            self.file.flush()
            # The contents reach the disk before the name does.
            os.fsync(self.file.fileno())
            size = self.tokens * self.dtype.itemsize
            self.entries[".bin"] = entry(Seal(self.digest.hexdigest(), size))
            with HashedFile(self.temporary_idx) as index:
                write_index(index, self.dtype, len(sizes), lambda: [sizes], self.doc_idx)
                self.entries[".idx"] = entry(index.sync())
            renames = [(self.temporary_bin, self.bin_path), (self.temporary_idx, self.idx_path)]
            give_names(renames)
        except OSError as error:
            self.abort()
            raise cannot_write(self.bin_path, error) from error
        finally:
            # Only now: closed, it would be what a killed writer left.
            self.file.close()

    def abort(self) -> None:
        """Close and delete the temporary files."""
        with contextlib.suppress(OSError):  # closing flushes what could not be written before
            self.file.close()
        for path in (self.temporary_bin, self.temporary_idx):
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


def give_names(renames: Sequence[tuple[Path, Path]]) -> None:
    """Rename finished files over the old ones: pairs (temporary, final).

    An .idx is deleted first and renamed last. A kill in between leaves a token file without an
    index, which nothing reads, and never new tokens under an old index.
    """
    for _, final in renames:
        if final.suffix == ".idx":
            final.unlink(missing_ok=True)
    for temporary, final in sorted(renames, key=lambda pair: pair[1].suffix == ".idx"):
        os.replace(temporary, final)


def write_index(
    file: IO[bytes],
    dtype: np.dtype[Any],
    count: int,
    sizes: Callable[[], Iterable[NDArray[np.int32]]],
    doc_idx: NDArray[np.int64] | None = None,
) -> None:
    """Write an .idx of `count` consecutive documents.

    `sizes` gives their tokens, any number of documents at a time; it is called twice, so that an
    index larger than the memory can be written. `doc_idx` (D,) are the document boundaries; None
    makes each sequence a document.
    """
    boundaries = count + 1 if doc_idx is None else len(doc_idx)
    file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], count, boundaries))
    for block in sizes():
        file.write(block.astype("<i4").tobytes())
    place = 0
    for block in sizes():
        ends = place + np.cumsum(block, dtype="<i8") * dtype.itemsize
        file.write((ends - block.astype("<i8") * dtype.itemsize).tobytes())
        if len(ends):
            place = int(ends[-1])
    if doc_idx is not None:
        file.write(doc_idx.astype("<i8").tobytes())
        return
    for start in range(0, boundaries, CHECK_BLOCK):
        stop = min(start + CHECK_BLOCK, boundaries)
        file.write(np.arange(start, stop, dtype="<i8").tobytes())


def require_tokens(dataset: IndexedDataset) -> None:
    """Refuse a file of floats, such as precomputed log-probabilities, where tokens are needed.

    Raises  DataError naming the file.
    """
    if dataset.dtype.kind == "f":
        raise DataError(
            f"{dataset.prefix}: holds {dataset.dtype}, expected integers; these are not tokens"
        )
