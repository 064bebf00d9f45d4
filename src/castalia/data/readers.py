"""Documents out of text files: plain text, one a file, and JSON lines, alone or in a .tar; also as .gz, .zst or .xz.

Parquet is read as well, see `parquet`. Everything streams: memory holds one line of JSON, or one plain text, at a
time; nothing is unpacked on disk.
"""

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from castalia.core.errors import DataError, nearest
from castalia.data.parquet import parquet_texts

JSON_LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst", ".xz")
SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz"}
TAR_END = 1024
"""A tar ends with so many zero bytes, two empty blocks."""
PIECE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


@dataclass
class TextFile:
    """One input file. `digest` and `bytes_read` are complete once `documents` has been read to its end.

    `named` says that the user named the file itself, and not a folder around it: then it must not be empty.
    """

    path: Path
    named: bool
    digest: Any = field(default_factory=hashlib.sha256)
    bytes_read: int = 0

    def documents(self, key: str = "text", on_read: Callable[[int], None] | None = None) -> Iterator[str]:
        """Its documents in order, empty ones too. `on_read` hears of bytes taken from the disk.

        Raises  DataError with file and line if the file is empty, damaged, not UTF-8 or not JSON lines with `key`.
        """
        self.digest, self.bytes_read = hashlib.sha256(), 0
        count = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                watched = WatchedFile(file, self, on_read)
                for text in self.texts(watched, key):
                    count += bool(text) or not self.named
                    yield text
                while watched.read(PIECE_BYTES):
                    pass
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, tarfile.TarError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(f"{self.path}: cannot be read: {reason}") from error
        if self.named and not count:
            raise DataError(f"{self.path}: {'is empty' if not self.bytes_read else 'holds no text'}")

    def texts(self, watched: "WatchedFile", key: str) -> Iterator[str]:
        """Its documents as its name says how to read them; Parquet is not read in order, and so not from `watched`."""
        if self.path.suffix.lower() == ".parquet":
            return parquet_texts(self.path, key)
        return documents_in(watched, self.path.name, str(self.path), key)


class WatchedFile(io.RawIOBase):
    """An open file whose bytes are hashed and counted as they go by."""

    def __init__(self, file: IO[bytes], into: TextFile, on_read: Callable[[int], None] | None) -> None:
        self.file, self.into, self.on_read = file, into, on_read

    def readable(self) -> bool:
        """As `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` asks."""
        piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        self.into.digest.update(piece)
        self.into.bytes_read += len(piece)
        if self.on_read and piece:
            self.on_read(len(piece))
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
                self.packed = self.file.read(PIECE_BYTES) or b""
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


def documents_in(file: Any, name: str, where: str, key: str) -> Iterator[str]:
    """The documents of an open file, which its name says how to read; `where` stands in errors."""
    name = name.lower()
    for short, long in SHORT.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    stream = unpacked(file, name)
    inner = next((name.removesuffix(end) for end in PACKED if name.endswith(end)), name)
    if inner.endswith(".tar"):
        return tar_members(stream, where, key)
    return json_lines(stream, where, key) if inner.endswith(JSON_LINES) else whole_text(stream, where)


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


def tar_members(stream: io.BufferedIOBase, where: str, key: str) -> Iterator[str]:
    """The documents of a tar's files in order, each read as its own name says; folders and hidden files are left out.

    Raises  DataError about a link, a device, a tar in the tar or a name that leads out of it;
            tarfile.TarError, EOFError about a damaged archive.
    """
    tailed = TailedStream(stream)
    with tarfile.open(fileobj=tailed, mode="r|") as archive:  # type: ignore[call-overload]
        for member in archive:
            inside, path = f"{where}({member.name})", Path(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(f"{inside}: the name leads out of the archive; such archives are refused")
            if member.isdir() or is_hidden(path):
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None or ".tar" in path.name.lower():
                raise DataError(f"{inside}: an archive may hold plain files only, no links, devices or archives")
            yield from documents_in(file, member.name, inside, key)
    while tailed.read(PIECE_BYTES):
        pass
    if tailed.tail.strip(b"\x00") or len(tailed.tail) < TAR_END:
        raise EOFError("the archive is cut off")


def whole_text(stream: io.BufferedIOBase, where: str) -> Iterator[str]:
    """The one document of a plain text."""
    data = stream.read().removeprefix(BOM)
    try:
        yield data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise not_utf8(where, line, error.start, data[error.start]) from None


def json_lines(stream: io.BufferedIOBase, where: str, key: str) -> Iterator[str]:
    """The texts under `key`, one a line; blank lines are left out."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(where, number, offset + error.start, error.object[error.start]) from None
        if text.strip():
            yield text_under(key, text.rstrip("\r\n"), f"{where}:{number}")
        offset += len(line)


def text_under(key: str, line: str, where: str) -> str:
    """The text under `key` of one JSON object."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a line must be a JSON object with the key {key!r}, got {type(value).__name__}")
    if key not in value:
        have = ", ".join(sorted(value)) or "no keys"
        raise DataError(f"{where}: no key {key!r}; have: {have}{nearest(key, value)}; name the right one with --key")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} must be a string, got {type(text).__name__}")
    if not is_unicode(text):
        raise DataError(f"{where}: {key!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return text


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON's escapes can spell what cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def not_utf8(where: str, line: int, offset: int, byte: int) -> DataError:
    """The error about a byte that is not UTF-8."""
    return DataError(f"{where}:{line}: not UTF-8: byte 0x{byte:02x} at offset {offset}; convert the file to UTF-8")


def list_files(inputs: Iterable[str | os.PathLike[str]]) -> list[TextFile]:
    """The files to read, in order: those named, and for a folder all files below it, sorted, but no hidden ones.

    A name with *, ? or [ that is no file stands for what it matches, sorted; ** for folders at any depth.
    Raises  DataError if one is missing, a pattern matches nothing, or a folder holds no files.
    """
    found: list[TextFile] = []
    for name in inputs:
        path = Path(name)
        if path.exists():
            found += below(path) if path.is_dir() else [TextFile(path, named=True)]
            continue
        if not glob.has_magic(str(path)):
            raise DataError(f"{path}: no such file or folder")
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not (files := [match for match in matches if match.is_file()]):
            raise DataError(f"{path}: no file matches this pattern")
        found += [TextFile(match, named=False) for match in files]
    if not found:
        raise DataError("no input files; name at least one file or folder")
    return found


def below(folder: Path) -> list[TextFile]:
    """The files of a folder."""
    inside = sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.relative_to(folder)))
    if not inside:
        raise DataError(f"{folder}: a folder without files")
    return [TextFile(path, named=False) for path in inside]


def is_hidden(path: Path) -> bool:
    """Whether the name of the file or of a folder around it starts with a dot."""
    return any(part.startswith(".") for part in path.parts)


def read_documents(inputs: Iterable[str | os.PathLike[str]], key: str = "text") -> Iterator[str]:
    """Every document of the inputs, in order.

    Raises  DataError, see `TextFile.documents` and `list_files`.
    """
    for file in list_files(inputs):
        yield from file.documents(key)
