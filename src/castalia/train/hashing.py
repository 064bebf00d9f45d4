"""Training files hashed wholly while training, by one thread that takes little of the machine."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from castalia.core.errors import CastaliaError
from castalia.core.files import atomic_write, cache_folder
from castalia.data.damage import REMEDY
from castalia.data.seals import RecordedFile

PIECE = 4 << 20
"""Bytes hashed at a time, without Python's lock."""
LEAST_PRIORITY = 19
FRESH_SECONDS = 7 * 86400.0
"""How long a file that was found whole is trusted, while its size and times stay: a disk that rots
changes none of these."""
CACHED_SHARE = 4
"""A file larger than one part in so many of the memory does not stay in the page cache, from which
it would displace what training reads."""


class HashingState(IntEnum):
    """How far the thread is; the largest of all ranks counts."""

    HASHING = 0
    WHOLE = 1
    DAMAGED = 2


class BackgroundHashing:
    """Compares files with their hashes in a thread, until all are whole or one is damaged.

    share  of one core and of the disk: after each piece the thread rests. 1 rests never.
    """

    def __init__(self, files: Sequence[RecordedFile], share: float) -> None:
        # The small ones first: most files are soon known.
        self.files = sorted(files, key=lambda file: file.size or 0)
        self.share = share
        self.total = sum(file.size or 0 for file in files)
        self.done = 0
        """Bytes that were compared, or found whole by an earlier run."""
        self.fault = ""
        self.state = HashingState.HASHING
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="hashing data")

    def start(self) -> None:
        """Begin, unless all files were found whole lately."""
        known = [file for file in self.files if is_fresh(file)]
        self.done = sum(file.size or 0 for file in known)
        self.files = [file for file in self.files if file not in known]
        self.thread.start()

    def close(self) -> None:
        """End the thread; a file in the middle of which it is counts for nothing."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def run(self) -> None:
        """The thread."""
        with suppress(OSError, AttributeError):  # a priority of its own is Linux's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
        for file in self.files:
            try:
                digest = self.digest(file)
            except OSError as error:
                self.fault = f"{file.paths[0]} cannot be read: {error.strerror or error}"
                digest = ""
            if digest is None:
                return
            if digest != file.sha256:
                reason = f"{file.paths[0]} is damaged: its SHA-256 is not the one in {file.by}"
                self.fault = f"{self.fault or reason}; {REMEDY}"
                self.state = HashingState.DAMAGED
                return
            remember(file)
        self.state = HashingState.WHOLE

    def digest(self, file: RecordedFile) -> str | None:
        """Hex SHA-256 of a file, read slowly; None if the run ended meanwhile."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(PIECE))
        stays = (file.size or 0) * CACHED_SHARE < machine_memory()
        for path in file.paths:
            with open(path, "rb", buffering=0) as opened:
                began = time.monotonic()
                while count := opened.readinto(buffer):
                    digest.update(buffer[:count])
                    self.done += count
                    if not stays and hasattr(os, "posix_fadvise"):
                        place = opened.tell() - count
                        os.posix_fadvise(opened.fileno(), place, count, os.POSIX_FADV_DONTNEED)
                    busy = time.monotonic() - began
                    if self.ended.wait(busy * (1 / self.share - 1)):
                        return None
                    began = time.monotonic()
        return digest.hexdigest()


def machine_memory() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def stamp_of(file: RecordedFile) -> Path:
    """The empty file whose age says when these contents were last found whole on this machine."""
    facts: list[object] = [file.sha256]
    for path in file.paths:
        status = path.stat()
        facts += [str(path.resolve()), status.st_ino, status.st_size]
        facts += [status.st_mtime_ns, status.st_ctime_ns]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache_folder() / "whole-files" / name


def is_fresh(file: RecordedFile) -> bool:
    """Whether a file was found whole lately, and nothing has written to it since."""
    try:
        return time.time() - stamp_of(file).stat().st_mtime < FRESH_SECONDS
    except OSError:
        return False


def remember(file: RecordedFile) -> None:
    """Stamp a file that is whole; without a place for it the next run reads it again."""
    with suppress(OSError, CastaliaError), atomic_write(stamp_of(file), synced=False):
        pass
