"""One part of a job: its documents read, turned into ids and written to files of their own, by any process."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from castalia.core.extras import require
from castalia.core.files import cannot_write, sha256_of
from castalia.corpus.documents import Fault, PieceReader, Row, Wanted
from castalia.corpus.encoding import Encoder, MismatchError, with_ends
from castalia.corpus.forms import TOKENS, Output, Texts
from castalia.corpus.inputs import InputFile
from castalia.corpus.pieces import Part
from castalia.corpus.provenance import DocumentColumns
from castalia.data.tokenizer import Tokenizer

FORMAT = 3
"""Raised when what a part's files hold changes, so that those of an older version are not taken over."""
BATCH_BYTES = 1 << 22
BATCH_ROWS = 8192
RAW_BYTES = 1 << 20
"""Bytes of a rejected document that go to the rejects file."""


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of a part, and where they go. Pickles to worker processes.

    `folder` holds the parts; `output` stands in errors. `reject` lets a job go on after a bad document. `documents`
    writes where each document came from. `form` says what becomes of the documents.
    """

    tokenizer: Tokenizer
    files: tuple[InputFile, ...]
    keys: tuple[str, ...]
    folder: str
    output: str
    eod_id: int | None = None
    keep: tuple[str, ...] = ()
    ftfy: bool = False
    reject: bool = False
    fast: bool = True
    documents: bool = True
    form: Texts = field(default_factory=Texts)

    @property
    def outputs(self) -> list[Output]:
        """The token files that it writes."""
        return self.form.outputs(self.keys, self.tokenizer)

    @property
    def settings(self) -> str:
        """What goes into each part's identity. `reject` does not: a part without a fault is the same either way."""
        said = [
            FORMAT,
            self.tokenizer.sha256,
            self.tokenizer.kind,
            self.eod_id,
            self.keys,
            self.keep,
        ]
        return repr([*said, self.ftfy, self.documents, self.form])

    @property
    def wanted(self) -> Wanted:
        """What is taken of each document."""
        mend = require("ftfy", "ftfy", "--ftfy").fix_text if self.ftfy else None
        return self.form.wanted(self.keys, self.keep, mend)


@dataclass
class PartRecord:
    """What came of a part: counts, and checksums by which its files are trusted later. `by` encoded it, `slow` says why
    not gigatoken, `again` what made it be encoded a second time; `uneven` counts documents with a text under some keys
    and none under others; `lines` and `filled` are lines and documents with text of each piece; `files` are the hashes
    of its small files. `failed` is the first fault of a job that stops there, as (piece, fault)."""

    number: int
    identity: str
    rows: int = 0
    empty: int = 0
    text_bytes: int = 0
    rejected: int = 0
    uneven: int = 0
    by: str = ""
    slow: str | None = None
    again: str | None = None
    lines: list[int] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    failed: tuple[int, Fault] | None = None

    def tokens(self, outputs: Sequence[Output]) -> int:
        """Tokens of the documents, labels and rewards not counted."""
        return sum(
            count["tokens"]
            for count, one in zip(self.outputs, outputs, strict=True)
            if one.kind == TOKENS
        )


def part_file(folder: str | os.PathLike[str], number: int, suffix: str) -> Path:
    """A file of a part: `record.json`, `rejects.jsonl`, and `0.bin`, `0.sizes`, `0.parquet` for each output."""
    return Path(folder) / f"{number:08d}.{suffix}"


class PartWriter:
    """The files of a part under temporary names, renamed by `keep`, removed without it."""

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number, self.mark = job, number, uuid.uuid4().hex[:8]
        self.files: dict[str, IO[bytes]] = {}
        self.claimed: dict[str, Path] = {}
        self.sums = [0 for _ in job.outputs]
        self.counts = [[0, 0] for _ in job.outputs]

    def claim(self, suffix: str) -> Path:
        """The temporary name of a file that is to be kept."""
        path = part_file(self.job.folder, self.number, suffix)
        self.claimed[suffix] = path.with_name(f".{path.name}.{self.mark}.tmp")
        return self.claimed[suffix]

    def write(self, suffix: str, data: Any) -> None:
        """Append to a file."""
        if suffix not in self.files:
            self.files[suffix] = open(self.claim(suffix), "wb")  # noqa: SIM115
        self.files[suffix].write(data)

    def add(self, output: int, ids: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Append documents to one output."""
        data = np.ascontiguousarray(ids).data
        self.write(f"{output}.bin", data)
        self.write(f"{output}.sizes", sizes.astype("<i4").data)
        self.sums[output] = crc32(data, self.sums[output])
        self.counts[output][0] += len(sizes)
        self.counts[output][1] += len(ids)

    def outputs(self) -> list[dict[str, Any]]:
        """Documents, tokens and checksum of each output; its SHA-256 is made of the whole, where parts are joined."""
        return [
            {"documents": documents, "tokens": tokens, "crc32": found}
            for (documents, tokens), found in zip(self.counts, self.sums, strict=True)
        ]

    def keep(self, record: PartRecord) -> None:
        """Give the files their names, the record last: without one a part does not exist."""
        if record.failed is not None:
            return
        for file in self.files.values():
            file.close()
        small = {
            suffix: path for suffix, path in self.claimed.items() if not suffix.endswith(".bin")
        }
        record.files = {suffix: sha256_of(path) for suffix, path in small.items()}
        self.claim("record.json").write_text(signed(vars(record)), encoding="utf-8")
        for suffix, path in self.claimed.items():
            os.replace(path, part_file(self.job.folder, self.number, suffix))

    def drop(self) -> None:
        """Remove what has no name yet."""
        for file in self.files.values():
            with contextlib.suppress(
                OSError
            ):  # the buffer that could not be written goes with the file
                file.close()
        for path in self.claimed.values():
            path.unlink(missing_ok=True)


def encode_part(job: Job, part: Part, encoder: Encoder) -> PartRecord:
    """Read, encode and write a part; once more by the tokenizer alone if gigatoken differs from it in a sample.

    Raises  CastaliaError if its files cannot be written.
    """
    again = None
    while True:
        writer = PartWriter(job, part.number)
        try:
            for suffix in (
                f"{i}.{kind}" for i in range(len(job.outputs)) for kind in ("bin", "sizes")
            ):
                writer.write(suffix, b"")
            record = fill(job, part, encoder, writer)
            record.by, record.slow, record.again = encoder.by, encoder.why_slow, again
            writer.keep(record)
            return record
        except MismatchError as error:
            encoder, again = encoder.slow(), str(error)
        except OSError as error:
            raise cannot_write(Path(job.output + ".bin"), error) from error
        finally:
            writer.drop()


def fill(job: Job, part: Part, encoder: Encoder, writer: PartWriter) -> PartRecord:
    """Write the documents of a part; the record says what they were."""
    record = PartRecord(part.number, part.identity, lines=[0] * len(part.pieces))
    filled = np.zeros(len(part.pieces), np.int64)
    outputs, wanted = job.outputs, job.wanted
    by_key = [
        [i for i, one in enumerate(outputs) if one.key == key] for key in range(len(job.keys))
    ]
    columns = {
        i: DocumentColumns(wanted.kept)
        for i, one in enumerate(outputs)
        if one.kind == TOKENS and job.documents
    }

    def reject(piece: int, fault: Fault) -> None:
        raw = fault.raw[:RAW_BYTES].decode("utf-8", "backslashreplace")
        told = {
            "piece": piece,
            "line": fault.line,
            "start": fault.start,
            "reason": fault.reason,
            "text": raw,
        }
        writer.write("rejects.jsonl", json.dumps(told).encode() + b"\n")
        record.rejected += 1

    for places, rows in batches(read(job, part, record, reject)):
        record.rows += len(rows)
        texts_of_row = np.zeros(len(rows), np.int64)
        for key, numbers in enumerate(by_key):
            texts = [row.texts[key] for row in rows]
            for i, (ids, sizes) in zip(numbers, job.form.encode(encoder, texts), strict=True):
                if outputs[i].kind == TOKENS:
                    full = sizes > 0
                    texts_of_row += full
                    record.empty += len(sizes) - int(full.sum())
                    record.text_bytes += sum(map(len, texts))
                    filled += np.bincount(np.asarray(places)[full], minlength=len(filled))
                ids, sizes = with_ends(ids, sizes, job.eod_id)
                writer.add(i, ids, sizes)
                if i in columns:
                    columns[i].add(places, rows, texts, full, sizes)
        record.uneven += int(np.count_nonzero((texts_of_row > 0) & (texts_of_row < len(by_key))))
    for i, found in columns.items():
        found.write(writer.claim(f"{i}.parquet"))
    record.outputs, record.filled = writer.outputs(), filled.tolist()
    return record


def read(
    job: Job, part: Part, record: PartRecord, reject: Callable[[int, Fault], None]
) -> Iterator[tuple[int, Row]]:
    """The rows of a part with their pieces' numbers, up to its limit; faults are rejected, or end it."""
    wanted, taken = job.wanted, 0
    for number, piece in enumerate(part.pieces):
        reader = PieceReader(piece, job.files[piece.file], wanted)
        for row in reader:
            if taken == part.rows:
                return
            if isinstance(row, Fault):
                if not job.reject:
                    record.failed = (number, row)
                    return
                reject(number, row)
                continue
            yield number, row
            taken += 1
        record.lines[number] = reader.lines


def batches(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[list[int], list[Row]]]:
    """Neighbouring rows with their pieces' numbers, about BATCH_BYTES at a time."""
    places: list[int] = []
    held: list[Row] = []
    size = 0
    for place, row in rows:
        places.append(place)
        held.append(row)
        size += sum(map(len, row.texts))
        if size >= BATCH_BYTES or len(held) >= BATCH_ROWS:
            yield places, held
            places, held, size = [], [], 0
    if held:
        yield places, held


def signed(record: dict[str, Any]) -> str:
    """A record as text, with its hash in the second line."""
    text = json.dumps(record)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def read_part_record(
    folder: str | os.PathLike[str], number: int, outputs: int
) -> PartRecord | None:
    """The record of a part that is there, and whose small files are as it says; else None."""
    try:
        text = part_file(folder, number, "record.json").read_text(encoding="utf-8")
        facts = json.loads(text.split("\n")[0])
        record = PartRecord(**facts)
        if signed(facts) != text or record.number != number or len(record.outputs) != outputs:
            return None
        same = all(
            sha256_of(part_file(folder, number, suffix)) == known
            for suffix, known in record.files.items()
        )
    except (OSError, ValueError, TypeError):
        return None
    return record if same else None
