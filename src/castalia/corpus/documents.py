"""Documents out of a piece, one at a time, with their places; what is wrong comes out as a `Fault` in its turn."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from castalia.core.errors import DataError, nearest
from castalia.corpus.columns import check_columns, column_rows
from castalia.corpus.inputs import InputFile
from castalia.corpus.pieces import ARROW, DAT, DAT_DIGITS, FAULT, LINES, PARQUET, Piece, damage_of
from castalia.corpus.streams import DAMAGE

BOM = b"\xef\xbb\xbf"
ID = "id"
"""The key under which a corpus gives a document its name, if it does."""
PARAGRAPHS = "\n\n"
"""Between the strings of a text that is a list of them, as lm_dataformat reads it."""

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]


def quick_loads(line: bytes) -> Any:
    """JSON of UTF-8 by the standard reader."""
    return json.loads(line.decode("utf-8"))


if orjson is not None:
    quick_loads = orjson.loads  # type: ignore[assignment]


class Row(NamedTuple):
    """One document. `line` counts from the piece's first: from 1 in JSON lines, rows from 0 in columns. [start, stop)
    are its bytes in the (unpacked) file, -1 in columns. `texts` are UTF-8, one a key; `kept` are the document's id and
    the chosen metadata, as text."""

    line: int
    start: int
    stop: int
    texts: tuple[bytes, ...]
    kept: tuple[str | None, ...]


class Fault(NamedTuple):
    """What is wrong with one document, or from there on with the file; `raw` are its bytes as far as there are any.
    `line` is None where the sentence stands alone."""

    line: int | None
    start: int
    reason: str
    raw: bytes = b""


class WrongError(Exception):
    """The reason why a document is none; the line is known to the caller."""


@dataclass(frozen=True)
class Wanted:
    """What to take of a document: the texts under `keys`, metadata under `keep`, and `mend` for each text."""

    keys: tuple[str, ...]
    keep: tuple[str, ...] = ()
    mend: Callable[[str], str] | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """The metadata as `Row.kept` has it."""
        return (ID, *(name for name in self.keep if name != ID))

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that must be there."""
        return self.keys

    @property
    def strings(self) -> tuple[str, ...]:
        """Those of them that must hold text."""
        return self.keys

    @property
    def takes_plain_text(self) -> bool:
        """Whether a whole file can be a document."""
        return len(self.keys) == 1

    def texts(self, values: dict[str, Any]) -> tuple[bytes, ...]:
        """The texts of a document as UTF-8.

        Raises  WrongError if one is not there or is no text.
        """
        return tuple(self.text(values, key) for key in self.keys)

    def text(self, values: dict[str, Any], key: str) -> bytes:
        """One text."""
        text = value_of(values, key, "--key")
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = PARAGRAPHS.join(text)
        if not isinstance(text, str):
            raise WrongError(
                f"{key!r} must be a string, got {'null' if text is None else type(text).__name__}"
            )
        return as_utf8(self.mend(text) if self.mend else text, repr(key))

    def metadata(self, values: dict[str, Any]) -> tuple[str | None, ...]:
        """The chosen metadata: strings as they are, the rest as JSON."""
        return tuple(as_text(values.get(name)) for name in self.kept)


def value_of(values: dict[str, Any], key: str, option: str) -> Any:
    """What stands under a key of a document; `option` is how the key was named.

    Raises  WrongError if nothing does.
    """
    if key not in values:
        have = ", ".join(sorted(values)) or "no keys"
        raise WrongError(
            f"no key {key!r}; have: {have}{nearest(key, values)}; name the right one with {option}"
        )
    return values[key]


def as_utf8(text: str, where: str) -> bytes:
    """A text as UTF-8.

    Raises  WrongError if it holds half a character.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise WrongError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        ) from None


def as_text(value: Any) -> str | None:
    """A metadata value as text."""
    if value is None or isinstance(value, str):
        return (
            value if value is None or value.isascii() else value.encode("utf-8", "replace").decode()
        )
    return (
        json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
        .encode("utf-8", "replace")
        .decode()
    )


class PieceReader:
    """The rows of a piece; `lines` is how many lines or rows of the file have gone by."""

    def __init__(self, piece: Piece, file: InputFile, wanted: Wanted) -> None:
        self.piece, self.file, self.wanted, self.lines = piece, file, wanted, 0

    def __iter__(self) -> Iterator[Row | Fault]:
        piece = self.piece
        try:
            if piece.form == FAULT:
                yield Fault(None, 0, (piece.data or b"").decode("utf-8", "surrogateescape"))
            elif piece.form in (PARQUET, ARROW):
                yield from self.columns()
            elif piece.form == LINES:
                yield from self.json_lines(*lines_in(piece, self.file))
            elif piece.form == DAT:
                yield from self.dat()
            else:
                yield self.whole_text()
        except DataError as error:
            yield Fault(None, 0, str(error))
        except DAMAGE as error:
            yield Fault(None, 0, f"{piece.path}: {damage_of(error)}")

    def columns(self) -> Iterator[Row | Fault]:
        """Rows of Parquet or Arrow."""
        piece, wanted = self.piece, self.wanted
        check_columns(self.file, piece.form, wanted.columns, wanted.strings)
        names = (*wanted.columns, *wanted.kept)
        for values in column_rows(self.file, piece.form, piece.start, piece.stop, names):
            number, self.lines = self.lines, self.lines + 1
            try:
                yield Row(number, -1, -1, wanted.texts(values), wanted.metadata(values))
            except WrongError as wrong:
                yield Fault(number, -1, str(wrong))

    def whole_text(self) -> Row | Fault:
        """The one document of a plain text."""
        if not self.wanted.takes_plain_text:
            return Fault(
                None,
                0,
                f"{self.piece.where}: a plain text has no keys; give JSON lines, or a single --key",
            )
        data = self.piece.data
        if data is None:
            with self.file.open() as file:
                data = file.read()
        start = len(BOM) if data.startswith(BOM) else 0
        try:
            return self.plain_row(1, start, data[start:])
        except UnicodeDecodeError as error:
            place = start + error.start
            line = data.count(b"\n", 0, place) + 1
            return Fault(line, place, not_utf8(data[place], error.start), data)

    def plain_row(self, line: int, start: int, data: bytes) -> Row:
        """A document without keys.

        Raises  UnicodeDecodeError.
        """
        text, kept = data.decode("utf-8"), (None,) * len(self.wanted.kept)
        mended = self.wanted.mend(text).encode("utf-8") if self.wanted.mend else data
        return Row(line, start, start + len(data), (mended,), kept)

    def dat(self) -> Iterator[Row | Fault]:
        """The documents of a `.dat.zst`; their number stands for the line."""
        data, place = self.piece.data or b"", 0
        if not self.wanted.takes_plain_text:
            yield Fault(
                None,
                0,
                f"{self.piece.where}: holds texts without keys; give JSON lines, or a single --key",
            )
            return
        while place < len(data):
            start = place + DAT_DIGITS
            place = start + int(data[place:start])
            self.lines += 1
            try:
                yield self.plain_row(self.lines, self.piece.start + start, data[start:place])
            except UnicodeDecodeError as error:
                yield Fault(
                    self.lines,
                    self.piece.start + start,
                    not_utf8(error.object[error.start], error.start),
                )

    def json_lines(self, data: bytes, begin: int) -> Iterator[Row | Fault]:
        """The documents of JSON lines; blank lines are left out."""
        wanted, stop = self.wanted, begin
        texts_of, metadata_of = wanted.texts, wanted.metadata
        for line in io.BytesIO(data):
            start, stop = stop, stop + len(line)
            self.lines += 1
            try:
                values = quick_loads(line)
                row = Row(
                    self.lines,
                    start,
                    stop,
                    texts_of(values),
                    metadata_of(exact(values, line, wanted)),
                )
                values = None  # a text of 100 MB may be 400 MB as a string
                yield row
            except (
                ValueError,
                TypeError,
                AttributeError,
                RecursionError,
                WrongError,
            ):  # the slow way finds the words
                try:
                    for values in careful(line, start, wanted):
                        yield Row(self.lines, start, stop, texts_of(values), metadata_of(values))
                except WrongError as wrong:
                    yield Fault(self.lines, start, str(wrong), line)


def lines_in(piece: Piece, file: InputFile) -> tuple[bytes, int]:
    """The lines that begin in the piece's bytes, and the place of the first."""
    if piece.data is not None:
        return piece.data, piece.start
    with open(file.path, "rb") as opened:
        if piece.start:
            opened.seek(piece.start - 1)
            opened.readline()
        begin = opened.tell()
        data = opened.read(max(piece.stop - begin, 0))
        if data and not data.endswith(b"\n"):
            data += opened.readline()
    return data, begin


def exact(values: Any, line: bytes, wanted: Wanted) -> Any:
    """The values, read again where a quick reader may round a number that is kept."""
    if all(isinstance(values.get(name), str | int | None) for name in wanted.kept):
        return values
    return json.loads(line.decode("utf-8-sig"))


def careful(line: bytes, start: int, wanted: Wanted) -> list[dict[str, Any]]:
    """The object in a line by the standard reader; none if the line is blank. A string, or a list of strings as
    lm_dataformat's JSONArchive writes, are documents without metadata.

    Raises  WrongError saying what is wrong with it.
    """
    try:
        text = line.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise WrongError(not_utf8(error.object[error.start], start + error.start)) from None
    if not text.strip():
        return []
    try:
        values = json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        spread = (
            "; each document must stand on a line of its own" if text.strip() in ("{", "[") else ""
        )
        raise WrongError(f"broken JSON at column {error.colno}: {error.msg}{spread}") from None
    except (ValueError, RecursionError) as error:
        raise WrongError(f"broken JSON: {error}") from None
    plain = values if isinstance(values, list) else [values]
    if wanted.takes_plain_text and all(isinstance(one, str) for one in plain):
        return [{wanted.keys[0]: one} for one in plain]
    if not isinstance(values, dict):
        key, kind = wanted.keys[0], type(values).__name__
        raise WrongError(f"a line must be a JSON object with the key {key!r}, got {kind}")
    return [values]


def not_utf8(byte: int, offset: int) -> str:
    """What is wrong with a byte that is not UTF-8."""
    return f"not UTF-8: byte 0x{byte:02x} at offset {offset}; convert the file to UTF-8"


def sentence(piece: Piece, fault: Fault, lines_before: int) -> str:
    """A fault as the user reads it; `lines_before` lines or rows of the file lie before the piece."""
    if fault.line is None:
        return fault.reason
    if piece.form in (PARQUET, ARROW):
        return f"{piece.where}: row {lines_before + fault.line}: {fault.reason}"
    return f"{piece.where}:{lines_before + fault.line}: {fault.reason}"


def read_pieces(
    pieces: Iterator[Piece], files: Sequence[InputFile], wanted: Wanted, reject: bool = False
) -> Iterator[tuple[Piece, Row]]:
    """Every row in order; with `reject` those with a fault are left out.

    Raises  DataError at the first fault, with file and line.
    """
    before, place = 0, None
    for piece in pieces:
        if place != (piece.file, piece.member):
            before, place = piece.before, (piece.file, piece.member)
        reader = PieceReader(piece, files[piece.file], wanted)
        for row in reader:
            if not isinstance(row, Fault):
                yield piece, row
            elif not reject:
                raise DataError(sentence(piece, row, before))
        before += reader.lines
