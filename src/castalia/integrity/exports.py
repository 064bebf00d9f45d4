"""Exports and imports: every file has its hash in the record, and the record its own."""

from collections.abc import Iterator, Set
from pathlib import Path

from castalia.core.errors import CheckpointError
from castalia.core.files import files_in
from castalia.core.sealed import OWN_HASH, SealedFiles
from castalia.formats.export_record import IMPORT_RECORD, RECORD, sealed_record, seals_of
from castalia.integrity.kinds import CheckedFile, FolderKind, unlisted

OF_HUBS = (".gitattributes", ".cache")
"""What a hub and its downloads put beside the files of an export."""


def check_export_folder(path: Path) -> Iterator[CheckedFile]:
    """The record of an export, every file that it lists, and those beside them."""
    listed = {path / RECORD}
    for checked in check_recorded(path / RECORD, {"to", "numbers", "model"}):
        listed.add(Path(checked.path))
        yield checked
    for file in files_in(path):
        if file not in listed and file.relative_to(path).parts[0] not in OF_HUBS:
            yield unlisted(file)


def check_import_folder(path: Path) -> Iterator[CheckedFile]:
    """The record of an import and the files beside its checkpoint, which is a folder of its own."""
    yield from check_recorded(path / IMPORT_RECORD, {"source", "model"})


def check_recorded(record_file: Path, keys: Set[str]) -> Iterator[CheckedFile]:
    """A record, and every file that it lists."""
    own = f"{OWN_HASH} in it"
    size = record_file.stat().st_size
    try:
        record = sealed_record(record_file, keys)
    except CheckpointError as error:
        yield CheckedFile(str(record_file), str(error), own, size)
        return
    voucher = ""
    # A record of an older version has no hash of its own, so that nothing vouches for it.
    if OWN_HASH in record:
        voucher = own
    yield CheckedFile(str(record_file), None, voucher, size)
    by = f"SHA-256 in {record_file.name}"
    # What this process has loaded may have changed since then without another time.
    files = SealedFiles()
    for name, seal in sorted(seals_of(record).items()):
        file = record_file.parent / name
        if file.is_file():
            yield CheckedFile(str(file), files.fault(file, seal), by, file.stat().st_size)
        else:
            yield CheckedFile(str(file), f"{file} is missing", by)


EXPORTS = FolderKind("export", lambda path: (path / RECORD).is_file(), check_export_folder)
IMPORTS = FolderKind(
    "import", lambda path: (path / IMPORT_RECORD).is_file(), check_import_folder, whole=False
)
