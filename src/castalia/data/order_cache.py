"""Index maps of large orders, kept on disk under the hash of all their inputs and opened
memory-mapped.

A file of maps is a safetensors file: plain numbers without pickle, which other programs can read.
Its header holds the whole key (a hash of the documents' sizes, every setting that enters the order,
the version of the algorithm) and one SHA-256 over key, shapes and numbers. Both are compared
whenever a file is opened: one pass on all cores, 0.5 s per GB and core. A hash for each block,
checked when the block is first read, would open sooner; but damage would then appear in the middle
of a run, where no map can be built any more.

Source  GPT-NeoX keeps its maps under a name without any hash (gpt2_dataset.py:229-247) and trusts
        the file.
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
from castalia.data.mapped import MappedFile

IndexMaps = Mapping[str, NDArray[Any]]
Key = Mapping[str, Any]

WORTH_BYTES = 64 << 20
"""Smaller maps are rebuilt each time, which takes well under a second and leaves no files
behind."""
SUFFIX = ".order"
"""Suffix of the folder beside a token file."""
WAIT_SECONDS = 900.0
"""Time a process waits for another that builds, before it builds for itself. A dead one ends the
wait."""
LENGTH = struct.Struct("<Q")
"""The beginning of a safetensors file: the length of its header in bytes."""
ALIGNMENT = 4096
"""Bytes to which the header is padded, so that the numbers begin on a page or close behind one."""
DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
"""safetensors' name of each dtype -> numpy's."""
NAMES = {np.dtype(name): code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class OrderCache:
    """Index maps in `folder`, one file for each key.

    If many processes need the same maps, one builds and writes them, and the others wait and open
    its file, so that all share its pages. If the builder dies, the next process builds. If the
    folder is not writable, each process builds in its own memory, after a warning.
    """

    folder: Path

    def maps(self, key: Key, size: int, build: Callable[[], IndexMaps]) -> IndexMaps:
        """The result of `build`, of about `size` bytes; `key` is a JSON dict of all its inputs."""
        digest = hashlib.sha256(key_text(key).encode()).hexdigest()[:16]
        path = self.folder / f"{key['order']}-{digest}.safetensors"
        before = version_of(path)
        kept = open_maps(path, key)
        if kept is not None:
            return kept
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(self.folder, WAIT_SECONDS))
                require_room(self.folder, size)
            except (OSError, CastaliaError) as error:
                self.warn(error)
                return build()
            if version_of(path) == before:
                return self.keep(path, key, build())
        # Another process wrote the file in the meantime. Outside of the claim, because checking
        # takes a pass over the file, which all who waited do at once.
        return open_maps(path, key) or build()

    def keep(self, path: Path, key: Key, maps: IndexMaps) -> IndexMaps:
        """Write maps and reopen them from the file; on an error, warn and keep them in memory."""
        try:
            # Temporary files of a process that was killed. The claim means that nobody else writes.
            for leftover in self.folder.glob(f".{path.name}.*.tmp"):
                leftover.unlink()
            write_maps(path, key, maps)
            return reopened(path)
        except (OSError, CastaliaError) as error:
            self.warn(error)
            return maps

    def warn(self, error: Exception) -> None:
        """Warn that nothing is kept, and why.

        The text is the same for every source of a folder, so that Python shows it once.
        """
        reason = getattr(error.__cause__ or error, "strerror", None) or str(error)
        warnings.warn(
            f"index maps cannot be kept in {self.folder.parent} ({reason}): each process builds"
            " them in memory at each start; set data.order_cache to a folder with room, or to"
            " false",
            stacklevel=2,
        )


def cache_of(prefix: str, option: str | bool) -> OrderCache | None:
    """The cache for the orders of a token file under data.order_cache; None if it is off."""
    if option is False:
        return None
    if option is True:
        return OrderCache(Path(prefix + SUFFIX))
    return OrderCache(Path(option))


def from_cache(
    cache: OrderCache | None, size: int, key: Callable[[], Key], build: Callable[[], IndexMaps]
) -> IndexMaps:
    """Maps of about `size` bytes: from the cache if there is one and they are worth it, else built.

    `key` is a function, because hashing the documents' sizes takes time of its own.
    """
    if cache is None or size < WORTH_BYTES:
        return build()
    return cache.maps(key(), size, build)


class KeptMaps(dict[str, NDArray[Any]]):
    """The maps of a file by name, memory-mapped read-only; `key` and `sha256` are its header's.

    Pickles as its path, so that worker processes share the pages too.
    Raises  DataError if the file is missing or not whole.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.content = MappedFile(path)
        try:
            end = self.read()
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            struct.error,
        ) as error:
            raise DataError(f"{path}: not a complete file of index maps ({error})") from None
        if end != len(self.content):
            raise DataError(f"{path}: {len(self.content)} bytes, but its header describes {end}")

    def read(self) -> int:
        """Read the header and map the arrays; returns the expected size of the file in bytes."""
        start = LENGTH.size + LENGTH.unpack(self.content[: LENGTH.size])[0]
        self.entries = json.loads(self.content[LENGTH.size : start])
        facts = self.entries.pop("__metadata__")
        self.key = facts["key"]
        self.sha256 = facts["sha256"]
        end: int = start
        for name, entry in self.entries.items():
            shape = entry["shape"]
            first, stop = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            self[name] = self.content.view(dtype, math.prod(shape), start + first).reshape(shape)
            end = max(end, start + stop)
        return end

    def check(self, key: Key) -> None:
        """Hash the whole file.

        Raises  DataError if it was made under another key or is damaged.
        """
        if self.key != key_text(key):
            raise DataError(f"{self.path}: its contents do not match the hash in its header")
        self.require_own_hash()

    def require_own_hash(self) -> None:
        """Hash the whole file, whatever it is of.

        Raises  DataError if it is damaged.
        """
        if self.sha256 != maps_hash(self.key, self.entries, self):
            raise DataError(f"{self.path}: its contents do not match the hash in its header")

    def __reduce__(self) -> tuple[Callable[[Path], "KeptMaps"], tuple[Path]]:
        return reopened, (self.path,)


def reopened(path: Path) -> KeptMaps:
    """Maps that this job has written or checked already, set up for reads in random order."""
    maps = KeptMaps(path)
    maps.content.read_at_random()
    return maps


def version_of(path: Path) -> tuple[int, int] | None:
    """Inode and time of a file, which change when it is replaced; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def open_maps(path: Path, key: Key) -> KeptMaps | None:
    """The maps kept under `key`; None without a file or, after a warning, if it is damaged."""
    if version_of(path) is None:
        return None
    try:
        # Checked in one mapping and used in another: the check reads from front to back.
        KeptMaps(path).check(key)
        return reopened(path)
    except DataError as error:
        warnings.warn(f"{error}; building it again", stacklevel=2)
        return None


def write_maps(path: Path, key: Key, maps: IndexMaps) -> None:
    """Write maps under `key`, atomically.

    Raises  CastaliaError if the disk is full.
    """
    entries: dict[str, Any] = {}
    place = 0
    for name, array in maps.items():
        stop = place + array.nbytes
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, stop],
        }
        place = stop
    facts = {"key": key_text(key), "sha256": maps_hash(key_text(key), entries, maps)}
    header = json.dumps({"__metadata__": facts, **entries}).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with atomic_write(path, "wb") as file:
        file.write(LENGTH.pack(len(header)) + header)
        for array in maps.values():
            # A view, not tobytes: the maps of the Pile have 2.6 GB.
            file.write(array.reshape(-1).view(np.uint8).data)


def key_text(key: Key) -> str:
    """The key as the header holds it."""
    return json.dumps(key, sort_keys=True)


def maps_hash(key: str, entries: Mapping[str, Any], maps: IndexMaps) -> str:
    """Hex SHA-256 of a key, of the header's description of the maps, and of their numbers."""
    hashes = [array_hash(array) for array in maps.values()]
    return hashlib.sha256(json.dumps([key, entries, *hashes]).encode()).hexdigest()


def require_room(folder: Path, size: int) -> None:
    """Check for free space before the work, not after it.

    Raises  DataError if there is less than `size` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(f"needs {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free")


def kept_files(folder: Path) -> tuple[int, int]:
    """Number of files of maps in a folder, and their bytes."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return len(sizes), sum(sizes)
