"""Token files cut into shards of equal size, as Pythia publishes them: finding, cutting and
joining.

`BASE.idx` stays whole. `BASE.bin` becomes `BASE-00000-of-00082.bin` to `BASE-00082-of-00082.bin`,
cut at any byte. The second number is that of the last shard, one less than their count.

Source  utils/shard_memmap.py:13-32 and unshard_memmap.py:16-45 of EleutherAI/pythia. These leave an
        empty last shard where the size is an exact multiple, which is read here but not written.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import CHUNK_BYTES, atomic_write, cannot_write

SHARD_NAME = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<last>\d{5})(\.bin)?")
SHARD_BYTES = 5_000_000_000
"""Size of Pythia's shards."""
MOST_SHARDS = 100_000
"""Limit of the five digits in a shard's name."""
OnBytes = Callable[[int], Any]
"""Callback for progress: the number of bytes processed since the last call."""


@dataclass(frozen=True)
class Joined:
    """The result of `join_shards`."""

    path: Path
    shards: int
    bytes: int
    kept: int
    """Bytes that were there already and right."""
    sha256: str
    """Hash of the whole .bin."""


def shard_name(base: str, number: int, last: int) -> str:
    """File name of one shard."""
    return f"{base}-{number:05}-of-{last:05}.bin"


def base_of(name: str) -> str:
    """The prefix to which a shard's name belongs; any other name unchanged."""
    match = SHARD_NAME.fullmatch(name)
    return match["base"] if match else name


def find_shards(base: str | os.PathLike[str]) -> list[Path]:
    """The shards of a prefix in order; empty without shards.

    Raises  DataError if some are missing, if there are two sets of shards, or if the sizes do not
            belong to one cut.
    """
    folder = Path(base).parent
    stem = Path(base).name
    sets: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("*-of-*.bin")):
        match = SHARD_NAME.fullmatch(path.name)
        if match and match["base"] == stem:
            sets.setdefault(int(match["last"]), {})[int(match["number"])] = path
    if not sets:
        return []
    if len(sets) > 1:
        names = " and ".join(f"-of-{last:05}" for last in sorted(sets))
        raise DataError(f"{base}: found several sets of shards ({names}); keep one of them")
    last, shards = next(iter(sets.items()))
    missing = [shard_name(stem, n, last) for n in range(last + 1) if n not in shards]
    if missing:
        names = ", ".join(missing[:3])
        if len(missing) > 3:
            names += " …"
        raise DataError(
            f"{base}: {len(missing)} of {last + 1} shards are missing: {names}; the last one ends"
            f" in -{last:05}-of-{last:05}.bin; copy the missing ones"
        )
    ordered = [shards[number] for number in range(last + 1)]
    check_sizes(ordered)
    return ordered


def check_sizes(shards: Sequence[Path]) -> None:
    """Check that all shards but the last have the same size, and that the last is not larger.

    A truncated shard would shift everything after it.
    Raises  DataError naming the shard that differs.
    """
    sizes = [path.stat().st_size for path in shards]
    for path, size in zip(shards[1:-1], sizes[1:-1], strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{path}: {size} bytes, but {shards[0].name} has {sizes[0]}; all shards but the"
                " last have the same size: copy the shorter one again"
            )
    if len(sizes) > 1 and sizes[-1] > sizes[0]:
        raise DataError(
            f"{shards[-1]}: {sizes[-1]} bytes, more than the {sizes[0]} of {shards[0].name}; copy"
            " it again"
        )


def read_chunks(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of an open file, a few MiB at a time."""
    file.seek(start)
    while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
        start += len(chunk)
        yield chunk


def hash_span(path: Path, start: int, stop: int, on_bytes: OnBytes | None = None) -> str:
    """Hex SHA-256 of bytes [start, stop) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in read_chunks(file, start, stop):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def same_bytes(path: Path, source: IO[bytes], start: int, stop: int) -> bool:
    """Whether a file exists and equals bytes [start, stop) of another."""
    if not path.exists() or path.stat().st_size != stop - start:
        return False
    with open(path, "rb") as file:
        chunks = read_chunks(source, start, stop)
        return all(file.read(len(chunk)) == chunk for chunk in chunks)


def cut_shards(
    bin_path: Path,
    base: str,
    output: str | os.PathLike[str],
    size: int,
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Write `bin_path` as shards of `size` bytes, `output/BASE-….bin`; returns their paths.

    Shards that exist and are equal stay; each of the others is written atomically.
    Raises  ConfigError if the size is impossible, or the folder has shards of another size;
            CastaliaError if the disk is full.
    """
    total = bin_path.stat().st_size
    if size < 1 or total > size * MOST_SHARDS:
        raise ConfigError(
            f"shards of {size} bytes: {bin_path} has {total} bytes; choose a size of at least 1"
            f" that gives at most {MOST_SHARDS:,} shards"
        )
    last = max(0, -(-total // size) - 1)
    for path in Path(output).glob(f"{base}-*-of-*.bin"):
        if base_of(path.name) == base and not path.name.endswith(f"-of-{last:05}.bin"):
            raise ConfigError(
                f"{output} has shards of another size, such as {path.name}; remove them or choose"
                " another folder"
            )
    written = []
    with open(bin_path, "rb") as source:
        for number in range(last + 1):
            path = Path(output) / shard_name(base, number, last)
            start = number * size
            stop = min(start + size, total)
            if not same_bytes(path, source, start, stop):
                with atomic_write(path, "wb") as file:
                    file.writelines(read_chunks(source, start, stop))
            if on_bytes:
                on_bytes(stop - start)
            written.append(path)
    return written


def join_shards(
    shards: Sequence[Path],
    bin_path: Path,
    *,
    hashes: Mapping[str, str] | None = None,
    sha256: str | None = None,
    on_bytes: OnBytes | None = None,
) -> Joined:
    """Write shards one after the other as `bin_path`, whose hash must be `sha256` if that is known.

    The bytes grow in a hidden neighbour `.NAME.partial`, renamed when all are there. A second call
    continues: existing bytes are compared with the shards, so that a wrong or half-written chunk is
    written again. A finished `bin_path` is only compared. `hashes` are SHA-256 by file name; a
    shard with another hash stops the call.
    Raises  DataError about a shard; ConfigError if `bin_path` holds other bytes; CastaliaError if
            the disk is full, with everything written so far kept.
    """
    total = sum(path.stat().st_size for path in shards)
    if bin_path.exists():
        if bin_path.stat().st_size != total:
            raise other_bytes(bin_path)
        with open(bin_path, "rb") as target:
            digest, kept = copy_shards(
                shards, lambda chunk: same_chunk(target, chunk, bin_path), hashes, on_bytes
            )
        return Joined(bin_path, len(shards), total, kept, digest)
    partial = bin_path.with_name(f".{bin_path.name}.partial")
    try:
        bin_path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        with open(partial, "r+b") as target:
            digest, kept = copy_shards(
                shards, lambda chunk: write_chunk(target, chunk), hashes, on_bytes
            )
            # A partial file of other shards may have been longer.
            target.truncate(total)
            target.flush()
            os.fsync(target.fileno())
        if sha256 is not None and digest != sha256:
            partial.unlink()
            raise DataError(
                f"{shards[0].parent}: one of the shards of {bin_path.name} is damaged: the SHA-256"
                f" of all is not the one in their record; copy them again"
            )
        os.replace(partial, bin_path)
    except OSError as error:
        raise cannot_write(bin_path, error) from error
    return Joined(bin_path, len(shards), total, kept, digest)


def copy_shards(
    shards: Sequence[Path],
    sink: Callable[[bytes], int],
    hashes: Mapping[str, str] | None,
    on_bytes: OnBytes | None,
) -> tuple[str, int]:
    """Pass all bytes of the shards to `sink` in order; it returns how many of them existed already.

    Returns the SHA-256 of all bytes, and how many existed already.
    """
    whole = hashlib.sha256()
    kept = 0
    for shard in shards:
        digest = hashlib.sha256()
        for chunk in shard_chunks(shard):
            whole.update(chunk)
            if hashes is not None:
                digest.update(chunk)
            kept += sink(chunk)
            if on_bytes:
                on_bytes(len(chunk))
        check_hash(shard, digest.hexdigest(), hashes)
    return whole.hexdigest(), kept


def other_bytes(bin_path: Path) -> ConfigError:
    """The error for a .bin that exists with other contents."""
    return ConfigError(
        f"{bin_path} exists and holds other bytes than the shards; remove it or choose another"
        " --output"
    )


def same_chunk(target: IO[bytes], chunk: bytes, path: Path) -> int:
    """Compare `chunk` with the next bytes of `target`; returns its length.

    Raises  ConfigError if they differ.
    """
    if target.read(len(chunk)) != chunk:
        raise other_bytes(path)
    return len(chunk)


def shard_chunks(shard: Path) -> Iterator[bytes]:
    """All bytes of a shard, a few MiB at a time.

    Raises  DataError if it cannot be read.
    """
    try:
        with open(shard, "rb") as file:
            yield from read_chunks(file, 0, shard.stat().st_size)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error


def write_chunk(target: IO[bytes], chunk: bytes) -> int:
    """Write `chunk` at the current place unless it is there; returns the bytes that were there."""
    start = target.tell()
    if target.read(len(chunk)) == chunk:
        return len(chunk)
    target.seek(start)
    target.write(chunk)
    return 0


def check_hash(shard: Path, actual: str, hashes: Mapping[str, str] | None) -> None:
    """Check a shard's hash against the list, if there is one.

    Raises  DataError if it differs, or the list does not have the shard.
    """
    if hashes is None or hashes.get(shard.name) == actual:
        return
    if shard.name not in hashes:
        raise DataError(f"{shard}: not in the list of hashes")
    raise DataError(f"{shard}: SHA-256 {actual}, expected {hashes[shard.name]}; copy it again")


def copy_beside(source: Path, target: Path) -> None:
    """Copy a small file (.idx, .json) atomically, unless it is missing or the same file."""
    if not source.exists() or (target.exists() and source.samefile(target)):
        return
    with open(source, "rb") as original, atomic_write(target, "wb") as copy:
        shutil.copyfileobj(original, copy, CHUNK_BYTES)
