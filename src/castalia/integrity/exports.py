"""Exports: every file has its hash in export.json."""

from collections.abc import Iterator
from pathlib import Path

from castalia.core.errors import CheckpointError
from castalia.core.files import files_in
from castalia.core.sealed import Seal, SealedFiles
from castalia.inference.exported import RECORD, read_record
from castalia.integrity.kinds import CheckedFile, FolderKind, unlisted

BY = f"SHA-256 in {RECORD}"


def recognizes(path: Path) -> bool:
    """Whether a folder is an export."""
    return (path / RECORD).is_file()


def check(path: Path) -> Iterator[CheckedFile]:
    """Every file that the record lists, and those beside them."""
    try:
        hashes = read_record(path).get("files_sha256", {})
    except CheckpointError as error:
        yield CheckedFile(str(path / RECORD), str(error), "its own form")
        return
    # What this process has loaded may have changed since then without another time.
    files = SealedFiles()
    for name, digest in sorted(hashes.items()):
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        yield CheckedFile(str(file), files.fault(file, Seal(digest)), BY, size)
    for file in files_in(path):
        if file.relative_to(path).as_posix() not in hashes:
            yield unlisted(file)


EXPORTS = FolderKind("export", recognizes, check)
