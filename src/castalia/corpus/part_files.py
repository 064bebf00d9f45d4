"""The files of one part: tokens, sizes, document index, rejects, and the record that signs them."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from castalia.core.files import sha256_of
from castalia.corpus.documents import Fault
from castalia.corpus.forms import TOKENS, Output
from castalia.corpus.job import PrepareJob

RECORD = "record.json"
REJECTS_OF_PART = "rejects.jsonl"


@dataclass
class PartRecord:
    """Counts of a part, and the checksums by which its files are trusted later."""

    number: int
    identity: str
    documents: int = 0
    """Documents read, empty ones included."""
    empty: int = 0
    """Texts without a token."""
    text_bytes: int = 0
    rejected: int = 0
    uneven: int = 0
    """Documents with text under some keys and none under others."""
    by: str = ""
    """The library that encoded."""
    fallback_reason: str | None = None
    """Why that is not gigatoken."""
    mismatch: str | None = None
    """The difference for which the part was encoded a second time, by the tokenizer alone."""
    lines: list[int] = field(default_factory=list)
    """Lines or rows of each extent."""
    filled: list[int] = field(default_factory=list)
    """Documents with text in each extent."""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """Documents, tokens and CRC-32 of each output."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the small files, by suffix."""
    failed: tuple[int, Fault] | None = None
    """Extent and fault that end the job."""

    def tokens(self, outputs: Sequence[Output]) -> int:
        """Tokens of the documents; labels and rewards do not count."""
        counts = zip(self.outputs, outputs, strict=True)
        return sum(count["tokens"] for count, output in counts if output.kind == TOKENS)


def part_file(folder: str | os.PathLike[str], number: int, suffix: str) -> Path:
    """A file of a part.

    Suffixes: `record.json`, `rejects.jsonl`; `0.bin`, `0.sizes`, `0.parquet` for output 0, and so
    on.
    """
    return Path(folder) / f"{number:08d}.{suffix}"


class PartWriter:
    """Writes the files of a part under temporary names; `keep` renames them, `drop` removes them.

    Several processes may work on one part, after a worker was lost: the names are unique.
    """

    def __init__(self, job: PrepareJob, number: int) -> None:
        self.job = job
        self.number = number
        self.mark = uuid.uuid4().hex[:8]
        self.files: dict[str, IO[bytes]] = {}
        self.claimed: dict[str, Path] = {}
        self.checksums = [0 for _ in job.outputs]
        self.documents = [0 for _ in job.outputs]
        self.tokens = [0 for _ in job.outputs]

    def claim(self, suffix: str) -> Path:
        """The temporary name of a file that `keep` will rename."""
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
        self.checksums[output] = crc32(data, self.checksums[output])
        self.documents[output] += len(sizes)
        self.tokens[output] += len(ids)

    def outputs(self) -> list[dict[str, Any]]:
        """Documents, tokens and checksum of each output.

        A CRC-32 is enough to detect damage; SHA-256 is computed once, over the whole output.
        """
        counts = zip(self.documents, self.tokens, self.checksums, strict=True)
        return [
            {"documents": documents, "tokens": tokens, "crc32": checksum}
            for documents, tokens, checksum in counts
        ]

    def keep(self, record: PartRecord) -> None:
        """Rename the files, the record last: a part without a record does not exist."""
        if record.failed is not None:
            return
        for file in self.files.values():
            file.close()
        for suffix, path in self.claimed.items():
            if not suffix.endswith(".bin"):
                record.files[suffix] = sha256_of(path)
        self.claim(RECORD).write_text(signed(vars(record)), encoding="utf-8")
        for suffix, path in self.claimed.items():
            os.replace(path, part_file(self.job.folder, self.number, suffix))

    def drop(self) -> None:
        """Remove the files that were not renamed."""
        for file in self.files.values():
            # On a full disk, close fails on the buffer; the file is removed anyway.
            with contextlib.suppress(OSError):
                file.close()
        for path in self.claimed.values():
            path.unlink(missing_ok=True)


def signed(record: dict[str, Any]) -> str:
    """A record as JSON, with its SHA-256 in the second line."""
    text = json.dumps(record)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def read_part_record(
    folder: str | os.PathLike[str], number: int, outputs: int
) -> PartRecord | None:
    """The record of a finished part; None if it is missing, damaged or contradicts a file."""
    try:
        text = part_file(folder, number, RECORD).read_text(encoding="utf-8")
        facts = json.loads(text.split("\n")[0])
        record = PartRecord(**facts)
        if signed(facts) != text or record.number != number or len(record.outputs) != outputs:
            return None
        for suffix, digest in record.files.items():
            if sha256_of(part_file(folder, number, suffix)) != digest:
                return None
    except (OSError, ValueError, TypeError):  # TypeError: fields of another version
        return None
    return record
