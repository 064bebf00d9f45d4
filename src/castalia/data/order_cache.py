"""Index maps of large orders, kept on disk under all that they were made from and opened memory-mapped.

A file is a safetensors file: plain numbers, no pickle, readable by anyone. Its header holds the whole key (a hash of
the documents' sizes, every setting that enters the order, the version of the algorithm) and one SHA-256 over key,
shapes and numbers. Both are compared each time a file is opened: one pass on all cores, 0.5 s a GB and core. A hash a
block, looked at when the block is first read, would open sooner; but then damage would come to light in the middle of
a run, where nothing can be built any more.

Source  GPT-NeoX keeps its maps under a name without any hash (gpt2_dataset.py:229-247) and takes what is there.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import CastaliaError, DataError
from castalia.core.files import atomic_write, claimed
from castalia.data.fingerprint import array_hash
from castalia.data.mapped import map_file, read_at_random, view

Maps = Mapping[str, NDArray[Any]]
Key = Mapping[str, Any]

WORTH_BYTES = 64 << 20
"""Smaller maps are built again each time: that takes well under a second, and leaves no files behind."""
SUFFIX = ".order"
"""Of the folder beside a token file."""
WAIT_SECONDS = 900.0
"""How long a process waits for another that builds, before it builds for itself. A dead one is not waited for."""
LENGTH = struct.Struct("<Q")
"""Bytes of the header that follows, the start of a safetensors file."""
DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
"""Names in safetensors, and in numpy."""
NAMES = {np.dtype(name): code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class OrderCache:
    """Index maps in `folder`, one file for each key.

    Of many processes that want the same maps one builds and writes them, and the others wait and open what it wrote,
    so that they share its pages. If it dies, the next one builds. Where the folder cannot be written, each builds
    in its own memory, after a warning.
    """

    folder: Path

    def maps(self, key: Key, size: int, build: Callable[[], Maps]) -> Maps:
        """What `build` gives for `key`, a JSON dict that says all of which it is made; `size` is about its bytes."""
        path = (
            self.folder
            / f"{key['order']}-{hashlib.sha256(key_text(key).encode()).hexdigest()[:16]}.safetensors"
        )
        before = state_of(path)
        if (found := open_maps(path, key)) is not None:
            return found
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(self.folder, WAIT_SECONDS))
                require_room(self.folder, size)
            except (OSError, CastaliaError) as error:
                self.warn(error)
                return build()
            if state_of(path) == before:
                return self.keep(path, key, build())
        return (
            open_maps(path, key) or build()
        )  # written meanwhile; all who waited look through it at once

    def keep(self, path: Path, key: Key, maps: Maps) -> Maps:
        """Write maps and open them from the file; the maps as they are, after a warning, if that fails."""
        try:
            for left in self.folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                left.unlink()
            write_maps(path, key, maps)
            return reopened(path)
        except (OSError, CastaliaError) as error:
            self.warn(error)
            return maps

    def warn(self, error: Exception) -> None:
        """Say why nothing is kept: the same words for each source of a folder, so that they are shown once."""
        reason = getattr(error.__cause__ or error, "strerror", None) or str(error)
        warnings.warn(
            f"index maps cannot be kept in {self.folder.parent} ({reason}): each process builds them in memory at each"
            " start; set data.order_cache to a folder with room, or to false",
            stacklevel=2,
        )


def cache_of(prefix: str, option: str | bool) -> OrderCache | None:
    """The cache for orders of a token file under data.order_cache."""
    if option is False:
        return None
    return OrderCache(Path(prefix + SUFFIX if option is True else option))


def from_cache(
    cache: OrderCache | None, size: int, key: Callable[[], Key], build: Callable[[], Maps]
) -> Maps:
    """Maps of about `size` bytes: from the cache if there is one and they are worth it, else built."""
    return build() if cache is None or size < WORTH_BYTES else cache.maps(key(), size, build)


class KeptMaps(dict[str, NDArray[Any]]):
    """The maps of a file by name, memory-mapped read-only; `key` and `sha256` are what its header says.

    Pickles as its path, so that processes that read data share the pages too.
    Raises  DataError if the file is missing or not whole.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.content = content = map_file(path)
        try:
            start = LENGTH.size + LENGTH.unpack(content[: LENGTH.size])[0]
            self.entries = json.loads(content[LENGTH.size : start])
            facts, end = self.entries.pop("__metadata__"), start
            self.key, self.sha256 = facts["key"], facts["sha256"]
            for name, entry in self.entries.items():
                shape, (first, stop) = entry["shape"], entry["data_offsets"]
                self[name] = view(
                    content, DTYPES[entry["dtype"]], math.prod(shape), start + first
                ).reshape(shape)
                end = max(end, start + stop)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            struct.error,
        ) as error:
            raise DataError(f"{path}: not a whole file of index maps ({error})") from None
        if end != len(content):
            raise DataError(f"{path}: {len(content)} bytes, but its header says {end}")

    def check(self, key: Key) -> None:
        """Go through the whole file.

        Raises  DataError if it was made under another key or is damaged.
        """
        if self.key != key_text(key) or self.sha256 != maps_hash(self.key, self.entries, self):
            raise DataError(f"{self.path}: its contents do not have the hash of its header")

    def __reduce__(self) -> tuple[Callable[[Path], "KeptMaps"], tuple[Path]]:
        return reopened, (self.path,)


def reopened(path: Path) -> KeptMaps:
    """Maps that this job has written or checked, ready for reads in no order."""
    found = KeptMaps(path)
    read_at_random(found.content)
    return found


def state_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def open_maps(path: Path, key: Key) -> KeptMaps | None:
    """The maps kept under `key`; None if there are none, or, after a warning, if they are damaged."""
    if state_of(path) is None:
        return None
    try:
        KeptMaps(path).check(key)
        return reopened(path)
    except DataError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=2)
        return None


def write_maps(path: Path, key: Key, maps: Maps) -> None:
    """Write maps under `key`, whole or not at all.

    Raises  CastaliaError if the disk is full.
    """
    entries: dict[str, Any] = {}
    place = 0
    for name, found in maps.items():
        stop = place + found.nbytes
        entries[name] = {
            "dtype": NAMES[found.dtype],
            "shape": list(found.shape),
            "data_offsets": [place, stop],
        }
        place = stop
    facts = {"key": key_text(key), "sha256": maps_hash(key_text(key), entries, maps)}
    header = json.dumps({"__metadata__": facts, **entries}).encode()
    header += b" " * (-len(header) % 4096)  # numbers begin where a page or nearly one does
    with atomic_write(path, "wb") as file:
        file.write(LENGTH.pack(len(header)) + header)
        for found in maps.values():
            file.write(found.reshape(-1).view(np.uint8).data)


def key_text(key: Key) -> str:
    """The key as it stands in the header."""
    return json.dumps(key, sort_keys=True)


def maps_hash(key: str, entries: Mapping[str, Any], maps: Maps) -> str:
    """Hex SHA-256 of a key, of what the header says of the maps, and of their numbers."""
    return hashlib.sha256(
        json.dumps([key, entries, *map(array_hash, maps.values())]).encode()
    ).hexdigest()


def require_room(folder: Path, size: int) -> None:
    """Room for so many bytes, seen before the work rather than after it.

    Raises  DataError if there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(f"{size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def kept_files(folder: Path) -> tuple[int, int]:
    """How many files of maps a folder holds, and their bytes."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return len(sizes), sum(sizes)
