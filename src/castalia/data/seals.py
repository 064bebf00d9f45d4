"""What PREFIX.json says of the files of its prefix: size and SHA-256 of each, and of the record
itself.

Every writer of token files seals its record here; records of older versions have the hash of the
.bin at most, and what they lack is not covered.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.files import sha256_of
from castalia.core.sealed import OWN_HASH, Seal, has_own_hash, with_own_hash
from castalia.data.shards import OnBytes, find_shards

FILES = "files"
"""Key of the files: by suffix, as `.idx`, or by name where it does not begin with the prefix."""
HEX_DIGITS = 64
"""Of a SHA-256."""


class RecordedFile(NamedTuple):
    """Files that are hashed as one, and what they must be: a .bin may lie in shards."""

    paths: tuple[Path, ...]
    bytes: int | None
    """Size of all, None where it is not known."""
    sha256: str
    by: str
    """The file that says so."""

    @property
    def size(self) -> int | None:
        """Bytes of the files as they are now; None if one is missing."""
        try:
            return sum(path.stat().st_size for path in self.paths)
        except FileNotFoundError:
            return None


def entry(seal: Seal) -> dict[str, Any]:
    """The entry of a file in a record."""
    return {"bytes": seal.size, "sha256": seal.sha256}


def entries_of(prefix: str, suffixes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The entries of those files that exist, by reading them."""
    entries = {}
    for suffix in suffixes:
        path = path_of(prefix, suffix)
        if path.is_file():
            entries[suffix] = entry(Seal(sha256_of(path), path.stat().st_size))
    return entries


def path_of(prefix: str, name: str) -> Path:
    """The file that a record calls by its suffix or its name."""
    if name.startswith("."):
        return Path(prefix + name)
    return Path(prefix).parent / name


def sealed(record: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the entries of its files and its own hash."""
    return with_own_hash({**record, FILES: dict(files)})


def require_own(
    path: Path,
    text: str,
    record: dict[str, Any],
    remedy: str = "copy it again, or prepare again with --overwrite",
) -> None:
    """Compare a record with its own hash, if it has one; `remedy` is how to go on.

    Raises  DataError.
    """
    last = next(reversed(record), "")
    # A flip may be in the name of the last key, whose value is then still a hash.
    is_flipped = last != "bin_sha256" and len(str(record.get(last))) == HEX_DIGITS
    if OWN_HASH not in record and not is_flipped:
        return
    if not has_own_hash(record, text):
        raise DataError(
            f"{path} is damaged: its SHA-256 is not the one in its last line; {remedy}; if it was"
            f" edited on purpose, remove {OWN_HASH} from it"
        )


def recorded_files(prefix: str, record: Mapping[str, Any]) -> dict[str, RecordedFile]:
    """The files of a prefix that its record has the hash of, by suffix or name."""
    entries: dict[str, Any] = {}
    if isinstance(record.get("bin_sha256"), str):
        # All that records of older versions have.
        entries[".bin"] = {"sha256": record["bin_sha256"]}
    if isinstance(record.get(FILES), dict):
        entries |= record[FILES]
    recorded = {}
    for name, facts in entries.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            continue
        paths = bin_paths(prefix) if name == ".bin" else [path_of(prefix, name)]
        recorded[name] = RecordedFile(
            tuple(paths), facts.get("bytes"), facts["sha256"], f"{prefix}.json"
        )
    return recorded


def bin_paths(prefix: str) -> Sequence[Path]:
    """The .bin, or the shards in its place.

    Raises  DataError if shards are missing.
    """
    whole = Path(prefix + ".bin")
    if whole.exists():
        return [whole]
    return find_shards(prefix) or [whole]


def fault_of(file: RecordedFile, on_bytes: OnBytes | None = None) -> str | None:
    """What is wrong with files, by reading them; None if they are right."""
    size = file.size
    if size is None:
        return "is missing; copy or prepare the file again"
    if file.bytes not in (None, size):
        return f"has {size} bytes, expected {file.bytes}; copy or prepare the file again"
    try:
        digest = sha256_of(*file.paths, on_bytes=on_bytes)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if digest != file.sha256:
        return f"SHA-256 is {digest}, expected {file.sha256}; copy or prepare the file again"
    return None
