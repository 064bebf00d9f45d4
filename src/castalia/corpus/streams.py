"""Bytes inside compressed files and archives, streamed; nothing is unpacked on disk."""

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

from castalia.core.errors import CastaliaError, DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst", ".xz")
SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz"}
TAR_END = 1024
"""A tar ends with this many zero bytes, two empty blocks."""
BUFFER_BYTES = 1 << 20
ZSTD_BYTES = 1 << 12
"""Compressed bytes decoded at a time: a hostile file may grow some 30,000 times, so this bounds the
memory beside the window at 128 MB. No more bytes at a time are any faster."""
LONGEST_WINDOW = 1 << 31
"""Bytes of a .zst that a match may reach back, at most: `zstd --ultra --long=31` writes such files.
The library's own limit of 2^27 is one of caution, and a window is allocated only as it fills."""
NO_MEMORY = "not enough memory"
"""Part of the library's error where an allocation fails."""
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
"""Exceptions that a damaged file raises. The last two come from zip files: of an unknown method, or
with a password."""


def plain_name(name: str) -> str:
    """A file name in lower case with short suffixes written out.

    OpenWebText's `urlsf_subset…_data.xz` are tars, though their names do not say so.
    """
    name = name.lower()
    if "urlsf_subset" in name and name.endswith("_data.xz"):
        return name.removesuffix(".xz") + ".tar.xz"
    for short, long in SHORT.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    return name


def inner_name(name: str) -> str:
    """The name without its compression suffix."""
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


class WatchedFile(io.RawIOBase):
    """An open file that passes all bytes read from it to a callback."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[bytes], None]) -> None:
        self.file = file
        self.on_bytes = on_bytes

    def readable(self) -> bool:
        """As `io` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` requires."""
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.on_bytes(data)
        return len(data)


def zstd_frame() -> Any:
    """A decompressor of one frame; frames share none, as its state is not reset by an error."""
    return zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst of one or more frames.

    zstandard's own reader takes a truncated file for a complete one; this one raises EOFError.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        self.file = file
        self.frame = zstd_frame()
        self.in_frame = False
        self.compressed = b""
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        """As `io` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` requires."""
        while not self.ready:
            if not self.compressed:
                self.compressed = self.file.read(ZSTD_BYTES) or b""
            if not self.compressed:
                if self.in_frame:
                    raise EOFError("the compressed file is truncated")
                return 0
            self.decompress()
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def decompress(self) -> None:
        """Decompress the bytes at hand, up to the end of the frame.

        Raises  CastaliaError if there is no memory for the window: a good file, unlike one that
                raises ZstdError.
        """
        try:
            self.ready = memoryview(self.frame.decompress(self.compressed))
        except zstandard.ZstdError as error:
            if NO_MEMORY not in str(error):
                raise
            raise CastaliaError(
                "no memory for the window of a .zst (up to 2 GiB: `zstd --long`); use fewer"
                " --workers, a machine with more memory, or compress the file again without --long"
            ) from None
        self.in_frame = not self.frame.eof
        self.compressed = self.frame.unused_data
        if self.frame.eof:
            self.frame = zstd_frame()


def decompressed(file: Any, name: str) -> io.BufferedIOBase:
    """The bytes of a file, decompressed as its name says."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=io.BufferedReader(file, BUFFER_BYTES))
    if name.endswith(".xz"):
        return lzma.LZMAFile(io.BufferedReader(file, BUFFER_BYTES))
    raw = ZstdFile(file) if name.endswith(".zst") else file
    return io.BufferedReader(raw, BUFFER_BYTES)


class TailedStream:
    """A stream that keeps its last bytes, to check how an archive ends."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.stream = stream
        self.tail = b""

    def read(self, count: int) -> bytes:
        """The next bytes."""
        data = self.stream.read(count)
        self.tail = (self.tail + data)[-TAR_END:]
        return data


def tar_members(stream: io.BufferedIOBase, where: str) -> Iterator[tuple[str, Any]]:
    """Name and open file of a tar's files, in order; folders and hidden files are skipped.

    Raises  DataError about a link, a device, a tar inside the tar, or a name that leads out of it;
            tarfile.TarError or EOFError about a damaged archive.
    """
    tailed = TailedStream(stream)
    with tarfile.open(fileobj=tailed, mode="r|") as archive:  # type: ignore[call-overload]
        for member in archive:
            if member.isdir() or not is_wanted(member.name, where):
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None or ".tar" in member.name.rsplit("/", 1)[-1].lower():
                raise DataError(
                    f"{where}({member.name}): an archive may hold plain files only, not links,"
                    " devices or archives; unpack it first"
                )
            yield member.name, file
    # tarfile stops at the first zero block and accepts a truncated archive; the end is checked
    # here.
    while tailed.read(BUFFER_BYTES):
        pass
    if tailed.tail.strip(b"\x00") or len(tailed.tail) < TAR_END:
        raise EOFError("the archive is truncated")


def zip_members(file: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Name and open file of a zip's files, in order; folders and hidden files are skipped."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir() or not is_wanted(member.filename, where):
                continue
            with archive.open(member) as opened:
                yield member.filename, opened


def is_wanted(name: str, where: str) -> bool:
    """Whether to read a member of an archive: not if it is hidden.

    Raises  DataError if its name leads out of the archive.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    has_drive = bool(path.parts) and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or has_drive:
        raise DataError(
            f"{where}({name}): the name leads out of the archive; such archives are refused"
        )
    return not any(part.startswith(".") for part in path.parts)
