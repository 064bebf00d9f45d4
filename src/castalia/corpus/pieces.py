"""How inputs are cut: into pieces that can be read on their own, and those into parts that one process works on.

The cut depends on the inputs alone, never on the number of processes, so an interrupted job finds its parts again.
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
    DAMAGE,
    JSON_LINES,
    PACKED,
    WatchedFile,
    inner_name,
    plain_name,
    tar_members,
    unpacked,
    zip_members,
)

PART_BYTES = 1 << 25
"""Text that a part holds, about: 32 MiB. A longer document makes a longer part."""
PART_PIECES = 4096
LINE_BYTES = (1 << 31) - 1
"""A longer line is taken for damage: no document may have as many tokens."""
LINES, TEXT, DAT, PARQUET, ARROW, FAULT = "lines", "text", "dat", "parquet", "arrow", "fault"
DAT_DIGITS = 16
"""Before each document of a `.dat.zst` of lm_dataformat stands how many bytes it has, in so many digits."""


@dataclass(frozen=True)
class Piece:
    """A stretch of one input.

    `form` says what it holds: JSON lines that begin in bytes [start, stop), one plain text, documents of a `.dat.zst`,
    Parquet row groups or Arrow batches [start, stop), or a fault, whose sentence is `data`. `data` are its bytes where
    only a reader in order could get them; without, whoever works on the piece opens the file. `size` is its text in
    bytes, about; `disk` the bytes of the file that are done with it. `before` are the lines or rows of the file before
    the first piece of a shard.
    """

    file: int
    path: str
    member: str | None
    form: str
    start: int
    stop: int
    data: bytes | None = field(default=None, repr=False)
    size: int = 0
    disk: int = 0
    before: int = 0

    @property
    def where(self) -> str:
        """The place as errors name it."""
        return f"{self.path}({self.member})" if self.member is not None else self.path

    def identity(self, stamp: str) -> list[Any]:
        """What its documents depend on."""
        held = hashlib.sha256(self.data).hexdigest() if self.data is not None else stamp
        return [self.path, self.member, self.form, self.start, self.stop, held]


@dataclass(frozen=True)
class Part:
    """Neighbouring pieces that are worked on together. `rows` is the most documents to take, None for all."""

    number: int
    pieces: tuple[Piece, ...]
    identity: str
    rows: int | None = None

    def first(self, rows: int) -> "Part":
        """Its first documents alone: another part, which a later job must not take for the whole one."""
        return replace(self, rows=rows, identity=f"{self.identity}[:{rows}]")


@dataclass(frozen=True)
class Shard:
    """Share `index`, from 0, of `count`: the pieces that begin in its share of the inputs' bytes.

    A file that must be read in order belongs to one share as a whole.
    """

    index: int = 0
    count: int = 1

    def holds(self, place: int, total: int) -> bool:
        """Whether what begins at byte `place` of `total` is ours."""
        return (
            min(place, total - 1) * self.count // total == self.index if total else self.index == 0
        )


def parts_of(
    files: Sequence[InputFile],
    settings: str,
    part_bytes: int,
    heard: "Heard",
    shard: Shard = Shard(),
) -> Iterator[Part]:
    """Every part of the inputs, in order. `settings` goes into the identity, as all that decides a part's bytes."""
    held: list[Piece] = []
    number = size = 0
    for piece in pieces_of_all(files, part_bytes, heard, shard):
        if held and (size + piece.size > part_bytes or len(held) == PART_PIECES):
            yield make_part(number, held, files, settings)
            held, size, number = [], 0, number + 1
        held.append(piece)
        size += piece.size
    if held:
        yield make_part(number, held, files, settings)


def make_part(
    number: int, pieces: Sequence[Piece], files: Sequence[InputFile], settings: str
) -> Part:
    """A part with its identity."""
    known = repr([settings, *(piece.identity(files[piece.file].stamp) for piece in pieces)])
    return Part(
        number, tuple(pieces), hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest()
    )


Heard = Callable[[int, bytes], None]
"""Told of the bytes of a file, by its number, that is read in order."""


def pieces_of_all(
    files: Sequence[InputFile], part_bytes: int, heard: Heard, shard: Shard = Shard()
) -> Iterator[Piece]:
    """The pieces of every file; damage to one becomes a piece of its own, so that it is told of in its turn."""
    total, place = sum(file.size for file in files), 0
    for number, file in enumerate(files):
        begin, place = place, place + file.size
        whole = shard.holds(begin, total)
        if not whole and in_order(file):
            continue
        try:
            told = 0
            first = True
            for piece in pieces_of(number, file, part_bytes, heard):
                if in_order(file) or shard.holds(begin + told, total):
                    yield (
                        replace(piece, before=lines_before(piece, file))
                        if first and told
                        else piece
                    )
                    first = False
                told += piece.disk
        except DataError as error:
            if whole:
                yield fault(number, file.path, str(error))
        except DAMAGE as error:
            if whole:
                yield fault(number, file.path, f"{file.path}: {damage_of(error)}")


def lines_before(piece: Piece, file: InputFile) -> int:
    """Lines or rows of the file before a piece."""
    if piece.form != LINES:
        return rows_before(file, piece.form, piece.start)
    count, left = 1, piece.start - 1
    with file.open() as opened:
        while left > 0 and (data := opened.read(min(left, 1 << 22))):
            count, left = count + data.count(b"\n"), left - len(data)
    return count


def damage_of(error: BaseException) -> str:
    """What is wrong with a file, from the exception."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {reason or type(error).__name__}"


def fault(number: int, path: str, sentence: str) -> Piece:
    """A piece that says what is wrong with the rest of a file."""
    return Piece(number, path, None, FAULT, 0, 0, sentence.encode("utf-8", "surrogateescape"))


def form_of(name: str) -> str:
    """How a file or member is read, by its name without compression."""
    if name.endswith(JSON_LINES):
        return LINES
    return (
        PARQUET
        if name.endswith(".parquet")
        else ARROW
        if name.endswith((".arrow", ".feather"))
        else TEXT
    )


def pieces_of(number: int, file: InputFile, part_bytes: int, heard: Heard) -> Iterator[Piece]:
    """The pieces of one file."""
    name = plain_name(file.name)
    form = form_of(name)
    if form in (PARQUET, ARROW):
        yield from column_pieces(number, file, form, part_bytes)
    elif in_order(file):
        yield from streamed(number, file, name, part_bytes, heard)
    elif form == TEXT:
        yield Piece(number, file.path, None, TEXT, 0, file.size, size=file.size, disk=file.size)
    else:
        for start in range(0, max(file.size, 1), part_bytes):
            stop = min(start + part_bytes, file.size)
            yield Piece(
                number, file.path, None, LINES, start, stop, size=stop - start, disk=stop - start
            )


def in_order(file: InputFile) -> bool:
    """Whether the file can only be read from its beginning, by the process that gives out the parts."""
    name = plain_name(file.name)
    if form_of(name) in (PARQUET, ARROW):
        return False
    return file.remote or name.endswith(PACKED) or inner_name(name).endswith((".tar", ".zip"))


def column_pieces(number: int, file: InputFile, form: str, part_bytes: int) -> Iterator[Piece]:
    """Pieces of a Parquet or Arrow file; the last accounts for what is not rows."""
    spans = (parquet_spans if form == PARQUET else arrow_spans)(file, part_bytes)
    told = 0
    for i, (start, stop, size) in enumerate(spans):
        disk = file.size - told if i == len(spans) - 1 else min(size, file.size - told)
        told += disk
        yield Piece(number, file.path, None, form, start, stop, size=size, disk=disk)


def streamed(
    number: int, file: InputFile, name: str, part_bytes: int, heard: Heard
) -> Iterator[Piece]:
    """Pieces, with their bytes, of a file that can only be read in order."""
    told = seen = 0

    def hear(piece: bytes) -> None:
        nonlocal seen
        seen += len(piece)
        heard(number, piece)

    with file.open() as opened:
        watched = WatchedFile(opened, hear)
        source = opened if name.endswith(".zip") else watched
        for member, form, start, data in stretches(source, name, file.path, part_bytes):
            disk, told = max(seen - told, 0), seen
            yield Piece(
                number, file.path, member, form, start, start + len(data), data, len(data), disk
            )
        while watched.read(1 << 20):
            pass
    yield Piece(number, file.path, None, LINES, 0, 0, b"", 0, max(seen, file.size) - told)


def stretches(
    source: Any, name: str, where: str, part_bytes: int
) -> Iterator[tuple[str | None, str, int, bytes]]:
    """Member, form, first byte and bytes of the texts in an open file."""
    if name.endswith(".zip"):
        members = zip_members(source, where)
    elif inner_name(name).endswith(".tar"):
        members = tar_members(unpacked(source, name), where)
    else:
        yield from ((None, *found) for found in cut(unpacked(source, name), name, part_bytes))
        return
    for member, opened in members:
        named, file = plain_name(member), Reopened(opened)
        if inner_name(named).endswith(".tar"):  # one of OpenWebText; others are refused
            for inside, *found in stretches(file, named, f"{where}({member})", part_bytes):
                yield (f"{member}/{inside}", *found)  # type: ignore[misc]
        else:
            yield from ((member, *found) for found in cut(unpacked(file, named), named, part_bytes))


class Reopened(io.RawIOBase):
    """A member of an archive as a raw stream, which closing does not close."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        """As `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io` asks."""
        piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def cut(stream: Any, name: str, part_bytes: int) -> Iterator[tuple[str, int, bytes]]:
    """Form, first byte and bytes of each piece: whole lines, or the one text. `name` says how it was compressed, too.

    Lines before damage come first; then what reading it raised is raised.
    """
    if name.endswith(".dat.zst"):
        yield from cut_dat(stream, part_bytes)
        return
    if form_of(inner_name(name)) != LINES:
        yield TEXT, 0, stream.read()
        return
    start, damage = 0, None
    while damage is None:
        data, damage = gather(stream, part_bytes - start % part_bytes)
        if damage is None and not data:
            return
        if damage is None and not data.endswith(b"\n"):
            data += stream.readline(LINE_BYTES)
        if damage is not None:
            data = data[: data.rfind(b"\n") + 1]
        if len(data) >= LINE_BYTES:
            raise EOFError(f"a line at byte {start} or after has more than {LINE_BYTES} bytes")
        yield LINES, start, data
        start += len(data)
    raise damage


def cut_dat(stream: Any, part_bytes: int) -> Iterator[tuple[str, int, bytes]]:
    """Pieces of whole documents of a `.dat.zst`; those before damage come first."""
    documents, held, start = dat_documents(stream), bytearray(), 0
    damage: BaseException | None = None
    while damage is None:
        try:
            held += (document := next(documents, b""))
        except DAMAGE as error:
            document, damage = b"", error
        if held and (not document or len(held) >= part_bytes):
            yield DAT, start, bytes(held)
            held, start = bytearray(), start + len(held)
        if damage is None and not document:
            return
    raise damage


def dat_documents(stream: Any) -> Iterator[bytes]:
    """Each document with its length before it.

    Raises  EOFError if it is cut off, or if no length stands where one must.
    """
    while stream.peek(1):
        head = exactly(stream, DAT_DIGITS)
        if not head.isdigit() or int(head) >= LINE_BYTES:
            raise EOFError(
                f"{head!r} where the length of a document must stand, in {DAT_DIGITS} digits"
            )
        yield head + exactly(stream, int(head))


def exactly(stream: Any, size: int) -> bytes:
    """The next `size` bytes.

    Raises  EOFError if there are fewer.
    """
    data, damage = gather(stream, size)
    if damage is not None or len(data) < size:
        raise damage or EOFError("the last document is cut off")
    return data


def gather(stream: Any, size: int) -> tuple[bytes, BaseException | None]:
    """The next `size` bytes, fewer at the end or before damage, and what the damage raised."""
    held: list[bytes] = []
    try:
        while size and (piece := stream.read1(size)):
            held.append(piece)
            size -= len(piece)
    except DAMAGE as error:
        return b"".join(held), error
    return b"".join(held), None
