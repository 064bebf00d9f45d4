"""Files against the size and SHA-256 that a record gives for them; records against their own."""

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import CastaliaError, CheckpointError

READERS = 4
"""Files hashed at the same time; hashlib releases the GIL."""


OWN_HASH = "record_sha256"
"""Key of the hash that a record, a JSON object, has of itself, written without this key."""


class Seal(NamedTuple):
    """What a record says about a file."""

    sha256: str
    """Hex SHA-256 of the bytes."""
    size: int | None = None
    """Bytes; None if the record does not say."""


def with_own_hash(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own hash as the last key, in place of an earlier one."""
    rest = {key: value for key, value in record.items() if key != OWN_HASH}
    return {**rest, OWN_HASH: hashlib.sha256(record_text(rest).encode()).hexdigest()}


def record_text(record: Mapping[str, Any]) -> str:
    """A record as `write_json` writes it."""
    return json.dumps(record, indent=1) + "\n"


def has_own_hash(record: Mapping[str, Any], text: str) -> bool:
    """Whether a record is as it was written, by its own hash; also its text, since a changed space
    is a changed file."""
    return with_own_hash(record) == record and record_text(record) == text


def open_regular(
    path: Path, error: type[CastaliaError] = CheckpointError, holder: str = "the folder"
) -> Any:
    """Open a plain file for reading in binary.

    A link could lead out of the folder, and a pipe would never end, so both are refused.
    Raises  `error` if the file is missing or not a plain file.
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would block before it could be refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as reason:
        if reason.errno != errno.ELOOP:
            raise
        raise error(f"{path} is a symbolic link; {holder} holds plain files only") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} is not a plain file")
    return os.fdopen(descriptor, "rb")


def fault_of_open(file: Any, path: Path, seal: Seal) -> str | None:
    """Why the content of an open file differs from its seal, or None.

    The size costs nothing and tells a truncated file from a flipped bit.
    """
    size = os.fstat(file.fileno()).st_size
    if seal.size is not None and size != seal.size:
        return f"{path} is corrupt: it has {size} bytes, expected {seal.size}"
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != seal.sha256:
        return f"{path} is corrupt: its SHA-256 is {digest[:12]}..., not the saved one"
    return None


def fault_of_file(path: Path, seal: Seal) -> str | None:
    """Why a file differs from its seal, or None. Links are no files here."""
    try:
        with open_regular(path) as file:
            return fault_of_open(file, path, seal)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"


class SealedFiles:
    """The files that this process has found whole, so that each content is hashed once.

    A file is known by device, inode, size and both of its times: whatever writes to it changes
    one of them. Links are followed, since caches of hubs consist of them.
    """

    def __init__(self) -> None:
        self.whole: set[tuple[Any, ...]] = set()
        self.lock = threading.Lock()

    def fault(self, path: Path, seal: Seal) -> str | None:
        """Why a file differs from its seal, or None."""
        try:
            with open(path, "rb") as file:
                now = os.fstat(file.fileno())
                times = (now.st_mtime_ns, now.st_ctime_ns)
                known = (now.st_dev, now.st_ino, now.st_size, *times, seal)
                if known in self.whole:
                    return None
                wrong = fault_of_open(file, path, seal)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"cannot read {path}: {error.strerror or error}"
        if wrong is None:
            with self.lock:
                self.whole.add(known)
        return wrong


SEEN = SealedFiles()
"""Of this process."""


def check_sealed(
    seals: Mapping[Path, Seal],
    remedy: str,
    error: type[CastaliaError] = CheckpointError,
) -> None:
    """Compare files with their seals, each content once in this process, several at a time.

    Takes   remedy: how to go on from a damaged file, the end of the sentence.
    Raises  `error` naming the first file, by path, that is missing or changed.
    """
    with ThreadPoolExecutor(READERS) as pool:
        # The largest first: one that begins last would keep the others waiting.
        order = sorted(seals, key=lambda path: -(seals[path].size or 0))
        faults = pool.map(lambda path: SEEN.fault(path, seals[path]), order)
        found = dict(zip(order, faults, strict=True))
    for path in sorted(found):
        if found[path]:
            raise error(f"{found[path]}; {remedy}")
