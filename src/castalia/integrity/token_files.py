"""Token files: PREFIX.json speaks for the files of its prefix."""

from collections.abc import Iterator
from pathlib import Path

from castalia.curate.verify import LIST, verify
from castalia.integrity.kinds import CheckedFile, FolderKind

MARK = b'\n "bin_sha256": '
"""What the record of a token file has, and no other JSON file at its first level."""


def prefixes(path: Path) -> list[Path]:
    """The prefixes of token files in a folder, or the one that a path names."""
    if path.is_dir():
        files = {file.with_suffix("") for file in path.glob("*.idx")}
        # The .idx may be the file that is missing.
        files |= {file.with_suffix("") for file in path.glob("*.json") if is_record(file)}
        return sorted(files)
    base = path
    if path.suffix in (".bin", ".idx", ".json"):
        base = path.with_suffix("")
    return [base] if Path(f"{base}.idx").is_file() or is_record(Path(f"{base}.json")) else []


def is_record(path: Path) -> bool:
    """Whether a file is the record of a token file."""
    return path.is_file() and MARK in path.read_bytes()


def check(path: Path) -> Iterator[CheckedFile]:
    """Each file with what `castalia data verify` finds about it."""
    for prefix in prefixes(path):
        yield from files_of(prefix)


def files_of(prefix: Path) -> Iterator[CheckedFile]:
    """The files of one prefix, each once."""
    by_record = f"SHA-256 in {prefix.name}.json"
    if Path(f"{prefix}{LIST}").is_file():
        by_record += f" or {prefix.name}{LIST}"
    vouchers = {"hash": by_record, "record": "its own SHA-256"}
    files: dict[str, CheckedFile] = {}
    for done in verify(prefix):
        # The structure is that of both files, whose positions are in one.
        if done.about == "structure":
            place = f"{done.file}.idx"
        else:
            place = done.file
        fault = done.wrong
        if fault and not fault.startswith(place):
            fault = f"{place}: {fault}"
        by = "" if done.note else vouchers.get(done.about, "")
        before = files.get(place, CheckedFile(place))
        size = 0
        if Path(place).is_file():
            size = Path(place).stat().st_size
        # A note comes after what it is about.
        by = by if done.note else by or before.by
        files[place] = CheckedFile(place, before.fault or fault, by, size)
    yield from files.values()


TOKEN_FILES = FolderKind("token files", lambda path: bool(prefixes(path)), check, whole=False)
