"""Token files in a bucket: a local prefix that stands for a URL.

FOLDER/train.idx, FOLDER/train.json     whole copies
FOLDER/train.remote.json                URL, sizes and tags of the objects when they were first read
FOLDER/train.blocks/                    blocks of the .bin that were read: see `RangedFile`

FOLDER is named by the hash of the URL, below the cache folder.
"""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, cache_folder, claimed
from castalia.storage.faults import StorageError
from castalia.storage.objects import Facts, ObjectStore, Transfer
from castalia.storage.ranged import RangedFile, changed

RECORD = ".remote.json"
BLOCKS = ".blocks"
GIB = 1 << 30
PATIENT = Transfer(retries=12)
"""A server that is gone for a minute does not end a run that reads from it."""


class Cache(NamedTuple):
    """Where bytes of buckets are kept."""

    folder: Path | None = None
    """None is `objects` in Castalia's cache folder."""
    limit: int | None = None
    """Most bytes of each .bin; None keeps all that was read."""


SETTINGS = {"cache": Cache()}
"""Of this process; a worker finds what it needs in the record."""
TWINS: dict[tuple[str, Cache], str] = {}
LOCK = threading.Lock()


def use_cache(folder: str | None, gib: float | None) -> None:
    """Where token files of buckets are kept from now on, and how much of each."""
    limit = None if gib is None else int(gib * GIB)
    SETTINGS["cache"] = Cache(None if folder is None else Path(folder), limit)


def base_of(url: str) -> str:
    """The URL of a prefix, without the suffix that it may carry."""
    for suffix in (".bin", ".idx"):
        url = url.removesuffix(suffix)
    return url


def twin(url: str) -> str:
    """The local prefix that stands for that of token files at a URL.

    Index and record are fetched whole the first time; later the objects must be the same by size
    and tag.
    Raises  DataError if one is missing or another one by now; StorageError.
    """
    cache = SETTINGS["cache"]
    key = (base_of(url), cache)
    with LOCK:
        if key not in TWINS:
            TWINS[key] = make_twin(*key)
        return TWINS[key]


def make_twin(url: str, cache: Cache) -> str:
    """See `twin`."""
    parent, _, name = url.rpartition("/")
    if not name or parent.endswith(":/"):
        raise DataError(
            f"{url}: expected the prefix of token files, such as s3://bucket/data/train"
        )
    store = ObjectStore(parent)
    root = cache.folder or cache_folder() / "objects"
    folder = root.absolute() / hashlib.sha256(url.encode()).hexdigest()[:16]
    record = folder / f"{name}{RECORD}"
    # Several ranks of a machine begin in the same moment; an index may take minutes.
    with claimed(folder, 1800.0, silent=5.0):
        now = facts_of(store, name)
        known = read_record(record)
        if known:
            try:
                require_same(url, folder, known["files"], now)
            except DataError:
                # An earlier run may have fetched some of the other object before it noticed.
                shutil.rmtree(folder / f"{name}{BLOCKS}", ignore_errors=True)
                raise
        for suffix in (".idx", ".json"):
            path = folder / f"{name}{suffix}"
            if suffix in now and not (known and path.exists()):
                half = folder / f".{name}{suffix}.half"
                store.fetch(f"{name}{suffix}", half, now[suffix].size)
                os.replace(half, path)
        files = {suffix: list(facts) for suffix, facts in now.items()}
        # Last: what it speaks of is there.
        with atomic_write(record) as file:
            json.dump({"url": url, "limit": cache.limit, "files": files}, file, indent=1)
    return str(folder / name)


def facts_of(store: ObjectStore, name: str) -> dict[str, Facts]:
    """Size and tag of each object of a prefix, by suffix; the record .json may be missing.

    Raises  DataError if another one is.
    """
    found = {}
    for suffix in (".bin", ".idx", ".json"):
        try:
            found[suffix] = store.facts(f"{name}{suffix}")
        except StorageError as error:
            if not error.missing:
                raise
            if suffix != ".json":
                raise DataError(
                    f"{error}; a token file is a pair PREFIX.bin and PREFIX.idx, whole and not in"
                    " shards"
                ) from None
    return found


def read_record(path: Path) -> dict[str, Any]:
    """The record of a twin; empty without one."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) and "files" in content else {}


def require_same(url: str, folder: Path, known: dict[str, Any], now: dict[str, Facts]) -> None:
    """Compare the objects with those that the cache is of.

    Raises  DataError naming the first that is another one.
    """
    for suffix, facts in now.items():
        before = Facts(*known.get(suffix, (0, "none")))
        if before != facts:
            raise DataError(
                f"{changed(url + suffix, before, facts)}, or delete {folder} to read the new one"
            )


def remote_bin(prefix: str) -> RangedFile | None:
    """The .bin that a local prefix stands for; None if it is no twin.

    Raises  StorageError where the object is another one by now.
    """
    known = read_record(Path(prefix + RECORD))
    if not known:
        return None
    parent, _, name = known["url"].rpartition("/")
    facts = Facts(*known["files"][".bin"])
    store = ObjectStore(parent, PATIENT)
    file = RangedFile(store, f"{name}.bin", facts, Path(prefix + BLOCKS), known["limit"])
    file.require_same()
    return file
