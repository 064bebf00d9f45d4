"""Downloads of corpus files, which continue where they stopped and are checked at the end."""

import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.files import CHUNK_BYTES, cannot_write, claimed, sha256_of

ATTEMPTS = 5
PATIENCE = 30.0
"""Seconds to wait for an answer, and for each next chunk."""
RETRY_STATUSES = (408, 429)
"""Client errors that are worth another attempt: timeout, too many requests."""

OnBytes = Callable[[int], Any]
"""Callback(bytes received)."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a corpus."""

    url: str
    sha256: str | None = None
    """None accepts any content; the record of the job tells which one it was."""
    size: int | None = None
    """In bytes; None if unknown."""

    @property
    def name(self) -> str:
        """The name on disk."""
        return Path(urllib.parse.urlsplit(self.url).path).name


def fetch(file: RemoteFile, path: Path, on_bytes: OnBytes | None = None) -> Path:
    """Download one file, unless it exists.

    Until it is complete and checked it is NAME.partial, written by one process at a time.
    Raises  DataError if the content is wrong or the server does not answer; CastaliaError if the
            disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(path.parent):
            if path.is_file():
                check(file, path)
            else:
                complete(file, path.with_name(path.name + ".partial"), path, on_bytes)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def complete(file: RemoteFile, partial: Path, path: Path, on_bytes: OnBytes | None) -> None:
    """Receive the missing bytes, check the file and rename it."""
    receive_all(file, partial, on_bytes)
    try:
        check(file, partial)
    except DataError:
        partial.unlink()  # it would only fail again
        raise
    os.replace(partial, path)
    etag_path(partial).unlink(missing_ok=True)


def receive_all(file: RemoteFile, partial: Path, on_bytes: OnBytes | None) -> None:
    """Receive until the partial file is complete, in at most ATTEMPTS attempts.

    Raises  DataError if it stays incomplete.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if receive(file, partial, on_bytes):
                return
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as error:
            refuse_final(file, error, attempt)
            # Exponential, at most 30 s; scaled with PATIENCE, which tests shorten.
            time.sleep(min(2**attempt, 30) * PATIENCE / 30)
    raise DataError(
        f"{file.url}: the connection broke {ATTEMPTS} times; run the same command to continue"
    )


def etag_path(partial: Path) -> Path:
    """The file with the server's ETag of the version being received."""
    return partial.with_name(partial.name + ".etag")


def refuse_final(file: RemoteFile, error: Exception, attempt: int) -> None:
    """Give up after the last attempt, or on an error that another attempt will not change.

    Raises  DataError with the reason.
    """
    status = error.code if isinstance(error, urllib.error.HTTPError) else None
    is_final = status is not None and status < 500 and status not in RETRY_STATUSES
    if not is_final and attempt < ATTEMPTS:
        return
    reason = getattr(error, "reason", None) or error
    if status is not None:
        reason = f"HTTP {status}"
    raise DataError(
        f"{file.url}: cannot be downloaded ({reason}); name your own copy of the file as input"
    ) from None


def receive(file: RemoteFile, partial: Path, on_bytes: OnBytes | None) -> bool:
    """Append the missing bytes to the partial file; whether it is complete, as far as known."""
    size = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(file.url, headers=range_headers(partial, size))
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not size:
            raise
        # 416: no bytes after ours. The file is complete, or longer than the server's.
        if file.size is not None and size != file.size:
            partial.unlink()
            return False
        return True
    with answer:
        continues = answer.status == 206
        expected_range = f"bytes {size}-"
        if continues and not answer.headers.get("Content-Range", expected_range).startswith(
            expected_range
        ):
            partial.unlink()  # other bytes than those asked for must never follow ours
            return False
        remember_etag(partial, answer.headers.get("ETag", ""))
        received = 0
        with open(partial, "ab" if continues else "wb") as out:
            while chunk := answer.read(CHUNK_BYTES):
                out.write(chunk)
                received += len(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
    expected = answer.headers.get("Content-Length")
    return expected is None or received == int(expected)


def range_headers(partial: Path, size: int) -> dict[str, str]:
    """Headers that ask for the bytes after the first `size`.

    If-Range makes the server send the whole file if it is another version by now.
    """
    if not size:
        return {}
    headers = {"Range": f"bytes={size}-"}
    if etag_path(partial).exists():
        etag = etag_path(partial).read_text(encoding="utf-8")
        if etag:
            headers["If-Range"] = etag
    return headers


def remember_etag(partial: Path, etag: str) -> None:
    """Keep the server's ETag for the next attempt; a weak one cannot vouch for byte ranges."""
    if etag.startswith("W/"):
        etag = ""
    etag_path(partial).write_text(etag, encoding="utf-8")


def check(file: RemoteFile, path: Path) -> None:
    """Check size and hash, as far as known.

    Raises  DataError naming the file.
    """
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise DataError(
            f"{path} has {size} bytes, but {file.url} has {file.size}; remove it and run the"
            " command again"
        )
    if file.sha256 is None:
        return
    digest = sha256_of(path)
    if digest != file.sha256:
        raise DataError(
            f"{path} has SHA-256 {digest}, but {file.url} has {file.sha256}; remove it and run the"
            " command again"
        )
