"""Token files cut into shards of equal size, as Pythia publishes them: found, cut, joined.

`BASE.idx` stays whole; `BASE.bin` becomes `BASE-00000-of-00082.bin` to `BASE-00082-of-00082.bin`, cut anywhere in
bytes. The second number is the last shard's, not how many there are.

Source  utils/shard_memmap.py:13-32 and unshard_memmap.py:16-45 of EleutherAI/pythia. Those leave an empty last shard
        where the size is an exact multiple, which is read here but not written.
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
OnBytes = Callable[[int], Any]


@dataclass(frozen=True)
class Joined:
    """What `unshard` wrote: `sha256` is that of the whole .bin; `kept` bytes were there already and right."""

    path: Path
    shards: int
    bytes: int
    kept: int
    sha256: str


def shard_name(base: str, number: int, last: int) -> str:
    """File name of one shard."""
    return f"{base}-{number:05}-of-{last:05}.bin"


def base_of(name: str) -> str:
    """The prefix that a shard's name belongs to; any other name as it is."""
    found = SHARD_NAME.fullmatch(name)
    return found["base"] if found else name


def find_shards(base: str | os.PathLike[str]) -> list[Path]:
    """The shards of a prefix in order; empty if there are none.

    Raises  DataError if some are missing, if two sets lie side by side, or if the sizes are not those of one cut.
    """
    folder, stem = Path(base).parent, Path(base).name
    sets: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("*-of-*.bin")) if folder.is_dir() else []:
        found = SHARD_NAME.fullmatch(path.name)
        if found and found["base"] == stem:
            sets.setdefault(int(found["last"]), {})[int(found["number"])] = path
    if not sets:
        return []
    if len(sets) > 1:
        names = " and ".join(f"-of-{last:05}" for last in sorted(sets))
        raise DataError(
            f"{base}: shards of several sets lie side by side ({names}); keep one of them"
        )
    last, shards = next(iter(sets.items()))
    if missing := [n for n in range(last + 1) if n not in shards]:
        names = ", ".join(shard_name(stem, n, last) for n in missing[:3]) + (
            " …" if len(missing) > 3 else ""
        )
        raise DataError(
            f"{base}: {len(missing)} of {last + 1} shards missing: {names}; the last one ends in"
            f" -{last:05}-of-{last:05}.bin; copy what is missing"
        )
    ordered = [shards[n] for n in range(last + 1)]
    check_sizes(ordered)
    return ordered


def check_sizes(shards: Sequence[Path]) -> None:
    """All shards but the last have one size, and the last is not larger.

    Raises  DataError naming the odd one: what follows a shard that is cut off would be read at the wrong place.
    """
    sizes = [path.stat().st_size for path in shards]
    for path, size in zip(shards[1:-1], sizes[1:-1], strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{path}: {size} bytes, but {shards[0].name} has {sizes[0]}; all shards but the last have one size:"
                " copy the shorter one again"
            )
    if len(sizes) > 1 and sizes[-1] > sizes[0]:
        raise DataError(
            f"{shards[-1]}: {sizes[-1]} bytes, more than the {sizes[0]} of {shards[0].name}; copy it again"
        )


def pieces(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of an open file, a few MiB at a time."""
    file.seek(start)
    while start < stop and (piece := file.read(min(CHUNK_BYTES, stop - start))):
        start += len(piece)
        yield piece


def hash_span(path: Path, start: int, stop: int, on_bytes: OnBytes | None = None) -> str:
    """Hex SHA-256 of bytes [start, stop) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in pieces(file, start, stop):
            digest.update(piece)
            if on_bytes:
                on_bytes(len(piece))
    return digest.hexdigest()


def same_bytes(path: Path, source: IO[bytes], start: int, stop: int) -> bool:
    """Whether a file exists and is bytes [start, stop) of another."""
    if not path.exists() or path.stat().st_size != stop - start:
        return False
    with open(path, "rb") as file:
        return all(file.read(len(piece)) == piece for piece in pieces(source, start, stop))


def cut(
    bin_path: Path,
    base: str,
    output: str | os.PathLike[str],
    size: int,
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Write the shards of `bin_path`, `size` bytes each, as `output/BASE-….bin`; returns them.

    Shards that are there and equal stay; each of the others appears whole or not at all.
    Raises  ConfigError about the size, or shards of another cut in the folder; CastaliaError if the disk is full.
    """
    total = bin_path.stat().st_size
    if size < 1 or total > size * 100_000:
        raise ConfigError(
            f"shards of {size} bytes: {bin_path} has {total}; take 1 or more, at most 100,000 shards"
        )
    last = max(0, -(-total // size) - 1)
    others = [
        p.name
        for p in Path(output).glob(f"{base}-*-of-*.bin")
        if not p.name.endswith(f"-of-{last:05}.bin")
    ]
    if others := [name for name in others if base_of(name) == base]:
        raise ConfigError(
            f"{output}: has shards of another size, such as {others[0]}; remove them or choose another"
        )
    written = []
    with open(bin_path, "rb") as source:
        for number in range(last + 1):
            path, start, stop = (
                Path(output) / shard_name(base, number, last),
                number * size,
                (number + 1) * size,
            )
            stop = min(stop, total)
            if not same_bytes(path, source, start, stop):
                with atomic_write(path, "wb") as file:
                    file.writelines(pieces(source, start, stop))
            if on_bytes:
                on_bytes(stop - start)
            written.append(path)
    return written


def join(
    shards: Sequence[Path],
    bin_path: Path,
    *,
    hashes: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> Joined:
    """Write shards one after the other as `bin_path`; returns what was done.

    The bytes grow in a hidden neighbour `.NAME.partial`, which gets its name when all are there. A second call goes on:
    what is there is compared with the shards, byte by byte, so a wrong or half-written piece is written again. A
    finished `bin_path` is only compared. `hashes` are SHA-256 by file name; a shard with another hash stops.
    Raises  DataError about a shard; ConfigError if `bin_path` holds other bytes; CastaliaError if the disk is full,
            with all that was written kept.
    """
    total = sum(path.stat().st_size for path in shards)
    if bin_path.exists():
        if bin_path.stat().st_size != total:
            raise other_bytes(bin_path)
        with open(bin_path, "rb") as target:
            digest, kept = pour(
                shards, lambda piece: same_piece(target, piece, bin_path), hashes, on_bytes
            )
        return Joined(bin_path, len(shards), total, kept, digest)
    partial = bin_path.with_name(f".{bin_path.name}.partial")
    try:
        bin_path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        with open(partial, "r+b") as growing:
            digest, kept = pour(shards, lambda piece: put(growing, piece), hashes, on_bytes)
            growing.truncate(total)
            growing.flush()
            os.fsync(growing.fileno())
        os.replace(partial, bin_path)
    except OSError as error:
        raise cannot_write(bin_path, error) from error
    return Joined(bin_path, len(shards), total, kept, digest)


def pour(
    shards: Sequence[Path],
    sink: Callable[[bytes], int],
    hashes: Mapping[str, str] | None,
    on_bytes: OnBytes | None,
) -> tuple[str, int]:
    """Hand all bytes of the shards to `sink` in order, which says how many were there already.

    Returns the SHA-256 of them all, and the sum of what `sink` said.
    """
    whole, kept = hashlib.sha256(), 0
    for shard in shards:
        digest = hashlib.sha256()
        for piece in shard_pieces(shard):
            whole.update(piece)
            if hashes is not None:
                digest.update(piece)
            kept += sink(piece)
            if on_bytes:
                on_bytes(len(piece))
        check_hash(shard, digest.hexdigest(), hashes)
    return whole.hexdigest(), kept


def other_bytes(bin_path: Path) -> ConfigError:
    """The error about a .bin that is there and not what would be written."""
    return ConfigError(
        f"{bin_path} exists and holds other bytes than the shards; remove it or choose another --output"
    )


def same_piece(target: IO[bytes], piece: bytes, path: Path) -> int:
    """Length of `piece`, if it is what comes next in `target`."""
    if target.read(len(piece)) != piece:
        raise other_bytes(path)
    return len(piece)


def shard_pieces(shard: Path) -> Iterator[bytes]:
    """All bytes of a shard, a few MiB at a time.

    Raises  DataError if it cannot be read.
    """
    try:
        with open(shard, "rb") as file:
            yield from pieces(file, 0, shard.stat().st_size)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error


def put(target: IO[bytes], piece: bytes) -> int:
    """Write `piece` where the file stands unless it is there already; returns how many bytes were."""
    start = target.tell()
    if target.read(len(piece)) == piece:
        return len(piece)
    target.seek(start)
    target.write(piece)
    return 0


def check_hash(shard: Path, found: str, hashes: Mapping[str, str] | None) -> None:
    """A shard has the hash that is listed for it, if there is a list.

    Raises  DataError if not, or if the list does not name it.
    """
    if hashes is None or hashes.get(shard.name) == found:
        return
    if shard.name not in hashes:
        raise DataError(f"{shard}: the list of hashes does not name it")
    raise DataError(f"{shard}: SHA-256 {found}, expected {hashes[shard.name]}; copy it again")


def copy_beside(source: Path, target: Path) -> None:
    """Copy a small neighbour (.idx, .json), whole or not at all; nothing to do if it is the same file or absent."""
    if not source.exists() or (target.exists() and source.samefile(target)):
        return
    with open(source, "rb") as read, atomic_write(target, "wb") as write:
        shutil.copyfileobj(read, write, CHUNK_BYTES)
