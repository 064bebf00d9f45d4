"""URLs of object stores: what names one, and what is wrong with it before anything is opened."""

import re
from typing import Any

from castalia.core.errors import ConfigError, nearest
from castalia.core.extras import require
from castalia.core.secrets import redacted, redacted_url

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
S3 = ("s3", "s3a")
"""Names of the protocol of S3, whose package is an extra of ours."""
CONNECT_SECONDS = 5
READ_SECONDS = 20
"""Time without a byte after which a request has failed: a server that hangs is one that is gone."""


def is_url(text: object) -> bool:
    """Whether a text names something in an object store: it begins with `SCHEME://`."""
    return isinstance(text, str) and SCHEME.match(text) is not None


def protocol_of(url: str) -> str:
    """`s3` of `s3://bucket/prefix`."""
    return url.partition("://")[0].lower()


def bucket_of(url: str) -> str:
    """The bucket of a URL, or the first part of its path."""
    return url.partition("://")[2].partition("/")[0]


def problem_of_url(url: str) -> str | None:
    """What is wrong with a URL, one sentence; None if it can be opened.

    Nothing is sent to the server.
    """
    # Imported on use: a config that names no URL need not wait for it.
    from fsspec.registry import known_implementations

    shown = redacted(url)
    if not is_url(url):
        return f"{shown!r} is not a URL such as s3://bucket/prefix or file:///mnt/copies"
    if redacted_url(url) != url:
        return (
            f"{shown}: a URL must not hold a password or a key, because config.yaml keeps it; set"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    protocol = protocol_of(url)
    if protocol not in known_implementations:
        return (
            f"{shown}: unknown protocol {protocol!r}; s3, gs, abfs, file and every other of fsspec"
            f" are known{nearest(protocol, known_implementations)}"
        )
    if protocol in S3 and not bucket_of(url):
        return f"{shown} names no bucket; write s3://BUCKET/PREFIX"
    return missing_package(protocol)


def missing_package(protocol: str) -> str | None:
    """Which package a protocol needs and does not find, with the pip command; None if none."""
    if protocol in S3:
        try:
            require("s3fs", "s3", "an s3:// URL")
        except ConfigError as error:
            return str(error)
        return None
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        return f"a {protocol}:// URL needs a package that is not installed: {error}"
    return None


def left_over(loop: Any, context: dict[str, Any]) -> None:
    """Errors of the event loop: that of a connection that was given up already is not printed."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def file_system(protocol: str) -> Any:
    """A file system of fsspec, of this process alone: sockets do not survive a fork.

    Credentials come from the environment, ~/.aws or the machine's role, as the protocol's own
    package finds them.
    """
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("file", "local"):
        options["auto_mkdir"] = True
    if protocol in S3:
        # One attempt: `ObjectStore` repeats, and knows how long it may.
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1},
        }
    # A listing that is remembered would hide what other machines have written since.
    options["use_listings_cache"] = False
    system = fsspec.filesystem(protocol, **options)
    if protocol in S3:
        system.retries = 1
        system.loop.set_exception_handler(left_over)
    return system
