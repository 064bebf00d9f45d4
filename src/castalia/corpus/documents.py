"""Documents read from extents, one at a time, with their places.

A faulty document is yielded as a `Fault` in its turn.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from castalia.core.errors import DataError, nearest
from castalia.corpus.columns import check_columns, column_rows
from castalia.corpus.extents import (
    ARROW,
    DAT,
    DAT_DIGITS,
    FAULT,
    LINES,
    PARQUET,
    Extent,
    damage_of,
)
from castalia.corpus.inputs import InputFile
from castalia.corpus.streams import DAMAGE

BOM = b"\xef\xbb\xbf"
ID = "id"
"""The key under which many corpora name their documents; kept wherever it exists."""
PARAGRAPH_BREAK = "\n\n"
"""Joins the strings of a text that is a list of them, as lm_dataformat does."""

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]


def fast_loads(line: bytes) -> Any:
    """Parse JSON in UTF-8 by orjson, several times as fast as Python's own parser, which serves
    where orjson has no wheel."""
    if orjson is None:
        return json.loads(line.decode("utf-8"))
    return orjson.loads(line)


class Document(NamedTuple):
    """One document and its place."""

    line: int
    """Counted from the extent's first: lines from 1, rows of columns from 0."""
    start: int
    stop: int
    """Its bytes [start, stop) in the (decompressed) file; -1 in columns."""
    texts: tuple[bytes, ...]
    """UTF-8, one for each key."""
    metadata: tuple[str | None, ...]
    """Its id and the chosen metadata, as text, in the order of `WantedFields.metadata_names`."""


class Fault(NamedTuple):
    """A faulty document, or damage to the rest of an input."""

    line: int | None
    """None if the reason names the place itself."""
    start: int
    reason: str
    raw: bytes = b""
    """The document's bytes, as far as there are any."""


class BadDocumentError(Exception):
    """The reason why a document is faulty; the caller knows its line."""


@dataclass(frozen=True)
class WantedFields:
    """The fields to take of a document: texts, metadata, and a function applied to each text."""

    keys: tuple[str, ...]
    keep: tuple[str, ...] = ()
    mend: Callable[[str], str] | None = None

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """Names of the metadata, in the order of `Document.metadata`."""
        return (ID, *(name for name in self.keep if name != ID))

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that every document must have."""
        return self.keys

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Other keys that are read where a document has them."""
        return ()

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Those of `columns` that must hold strings."""
        return self.keys

    @property
    def takes_plain_text(self) -> bool:
        """Whether a whole file without keys can be a document."""
        return len(self.keys) == 1

    def texts(self, values: dict[str, Any]) -> tuple[bytes, ...]:
        """The texts of a document in UTF-8.

        Raises  BadDocumentError if one is missing or is not text.
        """
        return tuple(self.text(values, key) for key in self.keys)

    def text(self, values: dict[str, Any], key: str) -> bytes:
        """The text under one key."""
        text = value_of(values, key, "--key")
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = PARAGRAPH_BREAK.join(text)
        if not isinstance(text, str):
            raise BadDocumentError(f"{key!r} must be a string, got {json_type(text)}")
        return as_utf8(self.mend(text) if self.mend else text, repr(key))

    def metadata(self, values: dict[str, Any]) -> tuple[str | None, ...]:
        """The id and the chosen metadata: strings unchanged, other values as JSON."""
        return tuple(as_text(values.get(name)) for name in self.metadata_names)


def json_type(value: Any) -> str:
    """The name of a value's type for an error message; `null` for None."""
    return "null" if value is None else type(value).__name__


def value_of(values: dict[str, Any], key: str, option: str) -> Any:
    """The value under a key of a document; `option` is the command-line option that named the key.

    Raises  BadDocumentError if the document lacks the key.
    """
    if key not in values:
        existing = ", ".join(sorted(values)) or "none"
        raise BadDocumentError(
            f"the document lacks the key {key!r}; keys: {existing}; choose one with {option}"
            f"{nearest(key, values)}"
        )
    return values[key]


def as_utf8(text: str, where: str) -> bytes:
    """A text in UTF-8.

    Raises  BadDocumentError if it holds a lone surrogate, which JSON can express.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadDocumentError(
            f"{where} contains a lone surrogate (\\ud800 to \\udfff), which is not a character"
        ) from None


def as_text(value: Any) -> str | None:
    """A metadata value as text; lone surrogates become `?`, as metadata must not stop a job."""
    if value is None:
        return None
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    if value.isascii():
        return value
    return str(value).encode("utf-8", "replace").decode()


class ExtentReader:
    """Iterates over the documents and faults of an extent.

    `lines` counts the lines or rows of the file that have been read.
    """

    def __init__(self, extent: Extent, file: InputFile, wanted: WantedFields) -> None:
        self.extent = extent
        self.file = file
        self.wanted = wanted
        self.lines = 0

    def __iter__(self) -> Iterator[Document | Fault]:
        extent = self.extent
        try:
            if extent.format == FAULT:
                yield Fault(None, 0, (extent.data or b"").decode("utf-8", "surrogateescape"))
            elif extent.format in (PARQUET, ARROW):
                yield from self.columns()
            elif extent.format == LINES:
                yield from self.json_lines(*lines_in(extent, self.file))
            elif extent.format == DAT:
                yield from self.dat()
            else:
                yield self.whole_text()
        except DataError as error:
            yield Fault(None, 0, str(error))
        except DAMAGE as error:
            yield Fault(None, 0, f"{extent.path}: {damage_of(error)}")

    def columns(self) -> Iterator[Document | Fault]:
        """Documents in the rows of Parquet or Arrow."""
        extent = self.extent
        wanted = self.wanted
        check_columns(self.file, extent.format, wanted.columns, wanted.text_columns)
        names = (*wanted.columns, *wanted.optional_columns, *wanted.metadata_names)
        for values in column_rows(self.file, extent.format, extent.start, extent.stop, names):
            number = self.lines
            self.lines += 1
            try:
                yield Document(number, -1, -1, wanted.texts(values), wanted.metadata(values))
            except BadDocumentError as error:
                yield Fault(number, -1, str(error))

    def whole_text(self) -> Document | Fault:
        """The one document of a plain text."""
        if not self.wanted.takes_plain_text:
            return Fault(
                None,
                0,
                f"{self.extent.where}: a plain text has no keys; give JSON lines or a single --key",
            )
        data = self.extent.data
        if data is None:
            with self.file.open() as file:
                data = file.read()
        start = len(BOM) if data.startswith(BOM) else 0
        try:
            return self.plain_document(1, start, data[start:])
        except UnicodeDecodeError as error:
            place = start + error.start
            line = data.count(b"\n", 0, place) + 1
            return Fault(line, place, not_utf8(data[place], error.start), data)

    def plain_document(self, line: int, start: int, data: bytes) -> Document:
        """A document without keys and metadata.

        Raises  UnicodeDecodeError.
        """
        text = data.decode("utf-8")
        stop = start + len(data)
        if self.wanted.mend:
            data = self.wanted.mend(text).encode("utf-8")
        return Document(line, start, stop, (data,), (None,) * len(self.wanted.metadata_names))

    def dat(self) -> Iterator[Document | Fault]:
        """The documents of a `.dat.zst`; their number takes the place of the line."""
        if not self.wanted.takes_plain_text:
            yield Fault(
                None,
                0,
                f"{self.extent.where}: its texts have no keys; give JSON lines or a single --key",
            )
            return
        data = self.extent.data or b""
        stop = 0
        while stop < len(data):
            start = stop + DAT_DIGITS
            stop = start + int(data[stop:start])
            self.lines += 1
            try:
                yield self.plain_document(self.lines, self.extent.start + start, data[start:stop])
            except UnicodeDecodeError as error:
                yield Fault(
                    self.lines,
                    self.extent.start + start,
                    not_utf8(error.object[error.start], error.start),
                )

    def json_lines(self, data: bytes, begin: int) -> Iterator[Document | Fault]:
        """The documents of JSON lines; blank lines are skipped.

        The hot loop of reading: a good line takes the fast parser and no branch. Whatever goes
        wrong there, the careful parser reads the line again and finds the words for it.
        """
        wanted = self.wanted
        stop = begin
        texts_of = wanted.texts
        metadata_of = wanted.metadata
        for line in io.BytesIO(data):
            start = stop
            stop += len(line)
            self.lines += 1
            try:
                values = fast_loads(line)
                document = Document(
                    self.lines,
                    start,
                    stop,
                    texts_of(values),
                    metadata_of(exact(values, line, wanted)),
                )
                values = None  # a text of 100 MB may take 400 MB as a string
                yield document
            except (ValueError, TypeError, AttributeError, RecursionError, BadDocumentError):
                try:
                    for values in careful(line, start, wanted):
                        yield Document(
                            self.lines, start, stop, texts_of(values), metadata_of(values)
                        )
                except BadDocumentError as error:
                    yield Fault(self.lines, start, str(error), line)


def lines_in(extent: Extent, file: InputFile) -> tuple[bytes, int]:
    """The lines that begin inside the extent's bytes, and the first one's offset in the file.

    The line that crosses the extent's start belongs to the previous extent, the one that crosses
    its end to this one: so every line is read once.
    """
    if extent.data is not None:
        return extent.data, extent.start
    with open(file.path, "rb") as opened:
        if extent.start:
            # From one byte earlier: a line that begins exactly at `start` is this extent's.
            opened.seek(extent.start - 1)
            opened.readline()
        begin = opened.tell()
        data = opened.read(max(extent.stop - begin, 0))
        if data and not data.endswith(b"\n"):
            data += opened.readline()
    return data, begin


def exact(values: Any, line: bytes, wanted: WantedFields) -> Any:
    """The values, parsed again where a fast parser may round a number that is kept.

    orjson turns integers beyond 64 bits into floats; Python's parser keeps every digit.
    """
    if all(isinstance(values.get(name), str | int | None) for name in wanted.metadata_names):
        return values
    return json.loads(line.decode("utf-8-sig"))


def careful(line: bytes, start: int, wanted: WantedFields) -> list[dict[str, Any]]:
    """The objects in a line, by Python's parser; none if the line is blank.

    A string is a document without metadata, and a list of strings is several, as written by
    lm_dataformat's JSONArchive.
    Raises  BadDocumentError with the reason.
    """
    try:
        # A byte order mark may stand at the beginning of the file only.
        text = line.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(not_utf8(error.object[error.start], start + error.start)) from None
    if not text.strip():
        return []
    try:
        values = json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        hint = ""
        if text.strip() in ("{", "["):  # an indented file
            hint = "; put each document on a line of its own"
        raise BadDocumentError(f"invalid JSON at column {error.colno}: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"invalid JSON: {error}") from None
    plain = values if isinstance(values, list) else [values]
    if wanted.takes_plain_text and all(isinstance(text, str) for text in plain):
        return [{wanted.keys[0]: text} for text in plain]
    if not isinstance(values, dict):
        raise BadDocumentError(
            f"a line must be a JSON object with the key {wanted.keys[0]!r}, got"
            f" {type(values).__name__}"
        )
    return [values]


def not_utf8(byte: int, offset: int) -> str:
    """The sentence about a byte that is not UTF-8."""
    return f"not UTF-8: byte 0x{byte:02x} at offset {offset}; convert the file to UTF-8"


def fault_sentence(extent: Extent, fault: Fault, lines_before: int) -> str:
    """A fault for the user; `lines_before` counts the file's lines or rows before the extent."""
    if fault.line is None:
        return fault.reason
    if extent.format in (PARQUET, ARROW):
        return f"{extent.where}: row {lines_before + fault.line}: {fault.reason}"
    return f"{extent.where}:{lines_before + fault.line}: {fault.reason}"


def read_extents(
    extents: Iterator[Extent],
    files: Sequence[InputFile],
    wanted: WantedFields,
    reject: bool = False,
) -> Iterator[tuple[Extent, Document]]:
    """Every document in order, with its extent; `reject` skips faulty ones.

    Raises  DataError at the first fault, with file and line.
    """
    lines = 0
    place = None
    for extent in extents:
        # Lines count through all extents of one file or member.
        if place != (extent.file, extent.member):
            place = (extent.file, extent.member)
            lines = extent.before
        reader = ExtentReader(extent, files[extent.file], wanted)
        for document in reader:
            if not isinstance(document, Fault):
                yield extent, document
            elif not reject:
                raise DataError(fault_sentence(extent, document, lines))
        lines += reader.lines
