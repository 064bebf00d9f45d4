"""A SHA-256 of a Parquet file inside itself, so that a table needs no second file.

Parquet has checksums of its pages, but none of its footer, in which names, places and the metadata
of a table stand. A value of that metadata holds the hash of the whole file, taken while the value
was zeros. A file without the value is of an older version, and not covered.
"""

import hashlib
import mmap
import os
import re
from pathlib import Path
from typing import IO, Any

KEY = b"castalia.sha256"
"""Name of the value in the metadata."""
UNSEALED = b"sha256:" + b"0" * 64
"""The value while the file is hashed."""
SEALED = re.compile(rb"sha256:([0-9a-f]{64})")
FOOTER_BYTES = 1 << 24
"""The end of the file in which the value is looked for."""


def with_place(schema: Any) -> Any:
    """A pyarrow.Schema, or Table, whose metadata has a place for the hash."""
    held = schema.metadata if hasattr(schema, "remove_metadata") else schema.schema.metadata
    metadata = {**(held or {}), KEY: UNSEALED}
    if hasattr(schema, "remove_metadata"):
        return schema.with_metadata(metadata)
    return schema.replace_schema_metadata(metadata)


def seal(file: IO[Any]) -> None:
    """Put the hash into a file that was written from `with_place`, before it is closed."""
    file.flush()
    with open(file.name, "r+b") as written, mmap.mmap(written.fileno(), 0) as content:
        place = content.rfind(UNSEALED)
        assert place >= 0, "the table was written without a place for its hash"
        digest = hashlib.sha256(content).hexdigest().encode()
        content[place : place + len(UNSEALED)] = b"sha256:" + digest
        content.flush()
        os.fsync(written.fileno())


def parquet_fault(path: str | os.PathLike[str]) -> str | None:
    """Why a sealed file is not what was written, in a few words; None if it is, or is not sealed.

    Raises  OSError.
    """
    if not Path(path).stat().st_size:
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        begin = max(0, len(content) - FOOTER_BYTES)
        found = [match for match in SEALED.finditer(content, begin) if match[0] != UNSEALED]
        if len(found) != 1:
            return None
        digest = hashlib.sha256(memoryview(content)[: found[0].start()])
        recorded = found[0][1].decode()
        digest.update(UNSEALED)
        digest.update(memoryview(content)[found[0].end() :])
        del found
    if digest.hexdigest() != recorded:
        return "its SHA-256 is not the one in it"
    return None
