"""Inputs cut into extents, stretches that can be read on their own.

The cut depends on the inputs alone, never on the number of workers: so an interrupted job finds its
parts again, and any number of workers writes the same bytes.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from castalia.core.errors import DataError
from castalia.corpus.columns import arrow_spans, parquet_spans, rows_before
from castalia.corpus.inputs import InputFile
from castalia.corpus.streams import (
    COMPRESSED,
    DAMAGE,
    JSON_LINES,
    WatchedFile,
    decompressed,
    inner_name,
    plain_name,
    tar_members,
    zip_members,
)

PART_BYTES = 1 << 25
"""Text in an extent, and in a part, about: 32 MiB. A longer document makes a longer extent."""
LINE_BYTES = (1 << 31) - 1
"""A longer line counts as damage: no document may have that many tokens (sizes are int32)."""
LINES = "lines"
TEXT = "text"
DAT = "dat"
PARQUET = "parquet"
ARROW = "arrow"
FAULT = "fault"
"""Formats of an extent; see `Extent.format`."""
DAT_DIGITS = 16
"""In a `.dat.zst` of lm_dataformat each document follows its number of bytes in 16 digits."""
READ_BYTES = 1 << 20
COUNT_BYTES = 1 << 22
"""Bytes read at a time to count the lines before an extent."""

OnInputBytes = Callable[[int, bytes], None]
"""Callback(number of the file, bytes) for files that are read sequentially."""


@dataclass(frozen=True)
class Extent:
    """A stretch of one input that can be read on its own."""

    file: int
    """Number of the input."""
    path: str
    member: str | None
    """Name inside an archive."""
    format: str
    """LINES: the JSON lines that begin in bytes [start, stop). TEXT: one plain text. DAT: documents
    of a `.dat.zst`. PARQUET, ARROW: row groups or batches [start, stop). FAULT: no documents, but a
    sentence in `data` about the rest of the input."""
    start: int
    stop: int
    data: bytes | None = field(default=None, repr=False)
    """The bytes, where they come from a sequential read; None lets the worker open the file."""
    size: int = 0
    """Bytes of text, about."""
    disk: int = 0
    """Bytes of the file that are consumed with this extent; for progress bars."""
    before: int = 0
    """Lines or rows of the file before the first extent of a share."""

    @property
    def where(self) -> str:
        """The place as errors name it."""
        return f"{self.path}({self.member})" if self.member is not None else self.path

    def identity(self, stamp: str) -> list[Any]:
        """Everything that its documents depend on; `stamp` is the file's size and age."""
        content = stamp
        if self.data is not None:
            content = hashlib.sha256(self.data).hexdigest()
        return [self.path, self.member, self.format, self.start, self.stop, content]


@dataclass(frozen=True)
class Share:
    """Share `index`, from 0, of `count`: the extents that begin in its part of the inputs' bytes.

    An input that must be read sequentially belongs to one share as a whole.
    """

    index: int = 0
    count: int = 1

    def holds(self, place: int, total: int) -> bool:
        """Whether an extent that begins at byte `place` of `total` belongs to this share."""
        if total == 0:
            return self.index == 0
        # Empty files at the end would begin at `total`, beyond the last share.
        return min(place, total - 1) * self.count // total == self.index


WHOLE = Share()


def extents_of_all(
    files: Sequence[InputFile],
    part_bytes: int,
    on_input_bytes: OnInputBytes,
    share: Share = WHOLE,
) -> Iterator[Extent]:
    """The extents of every input, in order.

    Damage to an input becomes an extent of its own, reported in its turn, after all documents that
    precede it.
    """
    total = sum(file.size for file in files)
    stop = 0
    for number, file in enumerate(files):
        begin = stop
        stop += file.size
        is_ours = share.holds(begin, total)
        if is_sequential(file) and not is_ours:
            continue
        try:
            yield from shared_extents(number, file, part_bytes, on_input_bytes, share, begin, total)
        except DataError as error:
            if is_ours:
                yield fault(number, file.path, str(error))
        except DAMAGE as error:
            if is_ours:
                yield fault(number, file.path, f"{file.path}: {damage_of(error)}")


def shared_extents(
    number: int,
    file: InputFile,
    part_bytes: int,
    on_input_bytes: OnInputBytes,
    share: Share,
    begin: int,
    total: int,
) -> Iterator[Extent]:
    """The extents of an input that belong to a share; the input begins at byte `begin` of all."""
    consumed = 0
    is_first = True
    for extent in extents_of(number, file, part_bytes, on_input_bytes):
        if is_sequential(file) or share.holds(begin + consumed, total):
            if is_first and consumed:
                # Errors name lines of the file, also those before this share.
                extent = replace(extent, before=lines_before(extent, file))
            yield extent
            is_first = False
        consumed += extent.disk


def lines_before(extent: Extent, file: InputFile) -> int:
    """Lines or rows of the file before an extent."""
    if extent.format != LINES:
        return rows_before(file, extent.format, extent.start)
    # The line that contains byte start - 1 precedes the extent, however it ends.
    count = 1
    left = extent.start - 1
    with file.open() as opened:
        while left > 0 and (data := opened.read(min(left, COUNT_BYTES))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def damage_of(error: BaseException) -> str:
    """The damage of a file in words."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return f"cannot be read: {reason or type(error).__name__}"


def fault(number: int, path: str, sentence: str) -> Extent:
    """An extent that reports damage to the rest of an input."""
    return Extent(number, path, None, FAULT, 0, 0, sentence.encode("utf-8", "surrogateescape"))


def format_of(name: str) -> str:
    """The format of a file or member, by its name without compression."""
    if name.endswith(JSON_LINES):
        return LINES
    if name.endswith(".parquet"):
        return PARQUET
    if name.endswith((".arrow", ".feather")):
        return ARROW
    return TEXT


def extents_of(
    number: int, file: InputFile, part_bytes: int, on_input_bytes: OnInputBytes
) -> Iterator[Extent]:
    """The extents of one input."""
    name = plain_name(file.name)
    file_format = format_of(name)
    if file_format in (PARQUET, ARROW):
        yield from column_extents(number, file, file_format, part_bytes)
    elif is_sequential(file):
        yield from sequential_extents(number, file, name, part_bytes, on_input_bytes)
    elif file_format == TEXT:
        yield Extent(number, file.shown, None, TEXT, 0, file.size, size=file.size, disk=file.size)
    else:
        # An empty file has one empty extent, so that it counts as read.
        for start in range(0, max(file.size, 1), part_bytes):
            stop = min(start + part_bytes, file.size)
            size = stop - start
            yield Extent(number, file.shown, None, LINES, start, stop, size=size, disk=size)


def is_sequential(file: InputFile) -> bool:
    """Whether the file can only be read from its beginning.

    Then the process that gives out the parts reads it, and sends the bytes along.
    """
    name = plain_name(file.name)
    if format_of(name) in (PARQUET, ARROW):
        return False
    is_archive = inner_name(name).endswith((".tar", ".zip"))
    return file.remote or name.endswith(COMPRESSED) or is_archive


def column_extents(
    number: int, file: InputFile, file_format: str, part_bytes: int
) -> Iterator[Extent]:
    """Extents of a Parquet or Arrow file; the last one also consumes what is not rows."""
    if file_format == PARQUET:
        spans = parquet_spans(file, part_bytes)
    else:
        spans = arrow_spans(file, part_bytes)
    consumed = 0
    for i, (start, stop, size) in enumerate(spans):
        disk = file.size - consumed
        if i < len(spans) - 1:
            disk = min(size, disk)
        consumed += disk
        yield Extent(number, file.shown, None, file_format, start, stop, size=size, disk=disk)


def sequential_extents(
    number: int, file: InputFile, name: str, part_bytes: int, on_input_bytes: OnInputBytes
) -> Iterator[Extent]:
    """Extents, with their bytes, of a file that can only be read sequentially."""
    read_bytes = 0
    consumed = 0

    def on_bytes(data: bytes) -> None:
        nonlocal read_bytes
        read_bytes += len(data)
        on_input_bytes(number, data)

    with file.open() as opened:
        watched = WatchedFile(opened, on_bytes)
        # zipfile seeks: its bytes do not pass in order, so a zip is not watched here.
        source = opened if name.endswith(".zip") else watched
        for member, file_format, start, data in texts_in(source, name, file.path, part_bytes):
            disk = max(read_bytes - consumed, 0)
            consumed = read_bytes
            stop = start + len(data)
            yield Extent(
                number, file.shown, member, file_format, start, stop, data, len(data), disk
            )
        # The callback must see every byte of the file: its hash covers a trailer as well.
        while watched.read(READ_BYTES):
            pass
    disk = max(read_bytes, file.size) - consumed
    yield Extent(number, file.shown, None, LINES, 0, 0, b"", 0, disk)


def texts_in(
    source: Any, name: str, where: str, part_bytes: int
) -> Iterator[tuple[str | None, str, int, bytes]]:
    """Member, format, first byte and bytes of the extents in an open file."""
    if name.endswith(".zip"):
        members = zip_members(source, where)
    elif inner_name(name).endswith(".tar"):
        members = tar_members(decompressed(source, name), where)
    else:
        for cut_format, start, data in cut(decompressed(source, name), name, part_bytes):
            yield None, cut_format, start, data
        return
    for member, opened in members:
        member_name = plain_name(member)
        file = UnclosedStream(opened)
        if inner_name(member_name).endswith(".tar"):  # only OpenWebText's; others are refused
            nested = texts_in(file, member_name, f"{where}({member})", part_bytes)
            for inside, cut_format, start, data in nested:
                yield f"{member}/{inside}", cut_format, start, data
        else:
            stream = decompressed(file, member_name)
            for cut_format, start, data in cut(stream, member_name, part_bytes):
                yield member, cut_format, start, data


class UnclosedStream(io.RawIOBase):
    """A member of an archive as a raw stream; closing it leaves the member open."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        """As `io` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` requires."""
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def cut(stream: Any, name: str, part_bytes: int) -> Iterator[tuple[str, int, bytes]]:
    """Format, first byte and bytes of each extent of a stream: whole lines, or the one text.

    `name` includes the compression suffix. Lines before damage come first, then the exception that
    the damage raised.
    """
    if name.endswith(".dat.zst"):
        yield from cut_dat(stream, part_bytes)
        return
    if format_of(inner_name(name)) != LINES:
        yield TEXT, 0, stream.read()
        return
    start = 0
    damage = None
    while damage is None:
        # Up to the next multiple of part_bytes: a long line does not shift the later cuts.
        data, damage = gather(stream, part_bytes - start % part_bytes)
        if damage is None and not data:
            return
        if damage is None and not data.endswith(b"\n"):
            data += stream.readline(LINE_BYTES)
        if damage is not None:
            data = data[: data.rfind(b"\n") + 1]
        if len(data) >= LINE_BYTES:
            raise EOFError(f"a line at byte {start} or later is longer than {LINE_BYTES} bytes")
        yield LINES, start, data
        start += len(data)
    raise damage


def cut_dat(stream: Any, part_bytes: int) -> Iterator[tuple[str, int, bytes]]:
    """Extents of whole documents of a `.dat.zst`; those before damage come first."""
    documents = dat_documents(stream)
    pending = bytearray()
    start = 0
    damage: BaseException | None = None
    while damage is None:
        document = b""
        try:
            document = next(documents, b"")
        except DAMAGE as error:
            damage = error
        pending += document
        if pending and (not document or len(pending) >= part_bytes):
            yield DAT, start, bytes(pending)
            start += len(pending)
            pending = bytearray()
        if damage is None and not document:
            return
    raise damage


def dat_documents(stream: Any) -> Iterator[bytes]:
    """Each document of a `.dat.zst`, preceded by its length.

    Raises  EOFError if the stream is truncated, or has no length where one belongs.
    """
    while stream.peek(1):
        head = read_exactly(stream, DAT_DIGITS)
        if not head.isdigit() or int(head) >= LINE_BYTES:
            raise EOFError(
                f"expected the length of a document in {DAT_DIGITS} digits, got {head!r}"
            )
        yield head + read_exactly(stream, int(head))


def read_exactly(stream: Any, size: int) -> bytes:
    """The next `size` bytes.

    Raises  EOFError if there are fewer.
    """
    data, damage = gather(stream, size)
    if damage is not None or len(data) < size:
        raise damage or EOFError("the last document is truncated")
    return data


def gather(stream: Any, size: int) -> tuple[bytes, BaseException | None]:
    """The next `size` bytes, fewer at the end or before damage; and the damage's exception."""
    chunks: list[bytes] = []
    try:
        while size and (chunk := stream.read1(size)):
            chunks.append(chunk)
            size -= len(chunk)
    except DAMAGE as error:
        return b"".join(chunks), error
    return b"".join(chunks), None
