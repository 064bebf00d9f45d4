"""The bytes inside compressed files and archives, as they come; nothing is unpacked on disk."""

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import zstandard

from castalia.core.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst", ".xz")
SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz"}
TAR_END = 1024
"""A tar ends with so many zero bytes, two empty blocks."""
PIECE_BYTES = 1 << 20
ZSTD_BYTES = 1 << 16
"""Compressed bytes taken at a time; a hostile file may grow some 30,000 times."""
DAMAGE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
)
"""What reading a damaged file raises; the last two come from zip files of an unknown method or with a password."""


def plain_name(name: str) -> str:
    """A file's name in lower case, short suffixes written out; OpenWebText's `urlsf_subset…_data.xz` are tars."""
    name = name.lower()
    if "urlsf_subset" in name and name.endswith("_data.xz"):
        return name.removesuffix(".xz") + ".tar.xz"
    for short, long in SHORT.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    return name


def inner_name(name: str) -> str:
    """The name without the suffix of its compression."""
    return next((name.removesuffix(end) for end in PACKED if name.endswith(end)), name)


class WatchedFile(io.RawIOBase):
    """An open file whose bytes are heard of as they go by."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[bytes], None]) -> None:
        self.file, self.on_bytes = file, on_bytes

    def readable(self) -> bool:
        """As `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` asks."""
        piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        self.on_bytes(piece)
        return len(piece)


class ZstdFile(io.RawIOBase):
    """The bytes inside a .zst of one or more frames. Unlike zstandard's own reader it notices a cut-off end."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.file, self.frame = file, zstandard.ZstdDecompressor().decompressobj()
        self.begun, self.packed, self.ready = False, b"", memoryview(b"")

    def readable(self) -> bool:
        """As `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` asks."""
        while not self.ready:
            if not self.packed:
                self.packed = self.file.read(ZSTD_BYTES) or b""
            if not self.packed:
                if self.begun:
                    raise EOFError("the compressed file is cut off")
                return 0
            self.unpack()
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def unpack(self) -> None:
        """Decompress what is packed, up to the end of the frame."""
        self.ready = memoryview(self.frame.decompress(self.packed))
        self.begun, self.packed = not self.frame.eof, self.frame.unused_data
        if self.frame.eof:
            self.frame = zstandard.ZstdDecompressor().decompressobj()


def unpacked(file: Any, name: str) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if its name says so."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=io.BufferedReader(file, PIECE_BYTES))
    if name.endswith(".xz"):
        return lzma.LZMAFile(io.BufferedReader(file, PIECE_BYTES))
    raw = ZstdFile(file) if name.endswith(".zst") else file
    return io.BufferedReader(raw, PIECE_BYTES)


class TailedStream:
    """A stream that remembers its last bytes, to see whether an archive ends as it should."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.stream, self.tail = stream, b""

    def read(self, count: int) -> bytes:
        """The next bytes."""
        piece = self.stream.read(count)
        self.tail = (self.tail + piece)[-TAR_END:]
        return piece


def tar_members(stream: io.BufferedIOBase, where: str) -> Iterator[tuple[str, Any]]:
    """Name and open file of a tar's files in order; folders and hidden files are left out.

    Raises  DataError about a link, a device, a tar in the tar or a name that leads out of it;
            tarfile.TarError, EOFError about a damaged archive.
    """
    tailed = TailedStream(stream)
    with tarfile.open(fileobj=tailed, mode="r|") as archive:  # type: ignore[call-overload]
        for member in archive:
            if member.isdir() or not wanted(member.name, where):
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None or ".tar" in member.name.rsplit("/", 1)[-1].lower():
                raise DataError(
                    f"{where}({member.name}): an archive may hold plain files only, no links, devices or archives"
                )
            yield member.name, file
    while tailed.read(PIECE_BYTES):
        pass
    if tailed.tail.strip(b"\x00") or len(tailed.tail) < TAR_END:
        raise EOFError("the archive is cut off")


def zip_members(file: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Name and open file of a zip's files in order; folders and hidden files are left out."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir() or not wanted(member.filename, where):
                continue
            with archive.open(member) as opened:
                yield member.filename, opened


def wanted(name: str, where: str) -> bool:
    """Whether a member is to be read.

    Raises  DataError if its name leads out of the archive.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts[:1] and path.parts[0].endswith(":")):
        raise DataError(
            f"{where}({name}): the name leads out of the archive; such archives are refused"
        )
    return not any(part.startswith(".") for part in path.parts)
