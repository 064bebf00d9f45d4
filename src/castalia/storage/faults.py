"""Errors of object stores as one sentence each: what failed, where, and how to go on."""

import errno
import re
from collections.abc import Iterator
from typing import Any

from castalia.core.errors import CastaliaError
from castalia.storage.urls import bucket_of, protocol_of

DENIED = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
"""Codes of S3 for credentials that are wrong, or do not suffice."""
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
"""Exceptions of botocore where it finds no credentials."""
GONE = {
    "ClientConnectorError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "ConnectionResetError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "ReadTimeoutError",
    "ResponseParserError",
    "ServerDisconnectedError",
    "TimeoutError",
}
"""Exceptions of the packages below where the server did not answer, or not to the end."""
BUSY = {"500", "502", "503", "504", "InternalError", "RequestTimeout", "SlowDown"}
"""Codes of a server that may answer the next time."""
LASTING = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Error numbers that another attempt meets again."""


ADDRESS = re.compile(r'"(https?://[^/"]+)[^"]*"')


class StorageError(CastaliaError):
    """An object store did not do what it was asked for.

    passing  whether another attempt may succeed: the server is gone or busy.
    missing  whether the object does not exist.
    """

    def __init__(self, text: str, *, passing: bool = False, missing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing
        self.missing = missing


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that led to it; fsspec hides those of the server."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def codes_of(error: BaseException) -> set[str]:
    """The error codes of S3, and the names of the exceptions, in a chain."""
    codes = set()
    for each in chain(error):
        codes |= {kind.__name__ for kind in type(each).__mro__}
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code", "")))
    return codes


def fault_of(error: BaseException, doing: str, url: str) -> StorageError:
    """The user's error for an exception; `doing` is a verb, such as `read`."""
    codes = codes_of(error)
    what = f"cannot {doing} {url}"
    reason = str(error).strip() or type(error).__name__
    if codes & NO_CREDENTIALS:
        return StorageError(
            f"{what}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
            " AWS_PROFILE, in the environment"
        )
    if "PermissionError" in codes or codes & DENIED:
        return StorageError(denied(what, url, reason))
    if "NoSuchBucket" in codes or "bucket does not exist" in reason:
        return StorageError(
            f"{what}: bucket {bucket_of(url)!r} does not exist; create it, or correct the URL",
        )
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{what}: it does not exist", missing=True)
    if codes & GONE:
        return StorageError(
            f"{what}: the server does not answer ({short(reason)}); check the network and"
            " AWS_ENDPOINT_URL",
            passing=True,
        )
    number = getattr(error, "errno", None)
    if codes & BUSY or (isinstance(error, OSError) and number not in LASTING):
        text = f"{what}: {short(reason)}; the server is busy, or its disk is full"
        return StorageError(text, passing=True)
    return StorageError(f"{what}: {short(reason)}; correct the URL or the rights there")


def denied(what: str, url: str, reason: str) -> str:
    """The sentence about credentials that the store refuses."""
    if protocol_of(url) in ("file", "local"):
        return f"{what}: {short(reason)}; give this user the right to write there"
    return (
        f"{what}: the server refuses the credentials ({short(reason)}); check AWS_ACCESS_KEY_ID"
        f" and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and their rights on bucket"
        f" {bucket_of(url)!r}"
    )


def short(reason: str) -> str:
    """A reason on one line, of at most 200 characters."""
    # Of an address the server is enough, and a dot would end the sentence.
    line = ADDRESS.sub(r"\1", " ".join(reason.split())).rstrip(".")
    return line if len(line) <= 200 else line[:199] + "…"
