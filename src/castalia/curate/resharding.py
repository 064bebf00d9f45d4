"""A whole token file cut into Pythia's shards, and shards joined to a whole file."""

import os
from collections.abc import Mapping
from filecmp import cmp
from pathlib import Path

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import IndexedDataset
from castalia.data.seals import fault_of, path_of, recorded_files
from castalia.data.shards import (
    SHARD_BYTES,
    Joined,
    OnBytes,
    copy_beside,
    cut_shards,
    find_shards,
    join_shards,
)
from castalia.data.sidecar import read_record

CHUNK_DOCUMENTS = 1 << 20
"""Documents whose ends are computed at a time: 8 MiB of int64."""


def shard(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    size: int = SHARD_BYTES,
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Cut PREFIX.bin into shards of `size` bytes in the folder `output`; returns their paths.

    PREFIX.idx, PREFIX.json and the files that this names are copied along. Repeating the call keeps
    the shards that are already correct.
    Raises  DataError if the token file is damaged; ConfigError if it is sharded already; see
            `shards.cut_shards`.
    """
    dataset = IndexedDataset(prefix)
    if dataset.shards:
        raise ConfigError(
            f"{dataset.prefix} consists of {len(dataset.shards)} shards already; to cut it to"
            " another size, join it with `castalia data unshard` first"
        )
    base = Path(dataset.prefix).name
    refuse_other_neighbours(dataset.prefix, Path(output) / base)
    written = cut_shards(dataset.bin_path, base, output, size, on_bytes)
    copy_neighbours(dataset.prefix, Path(output) / base)
    return written


def unshard(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> Joined:
    """Join the shards of a prefix into `output`/BASE.bin, by default beside them.

    The other files of the prefix are copied along. Repeating an interrupted call continues it;
    repeating a finished one compares the files. `hashes` maps file names to SHA-256, such as
    Pythia's list.
    Raises  DataError if a shard is missing or has another size or hash, or if the shards do not
            end with the last document; ConfigError if the .bin exists with other bytes; see
            `shards.join_shards`.
    """
    dataset = IndexedDataset(prefix)
    shards = dataset.shards or find_shards(dataset.prefix)
    if not shards:
        raise ConfigError(f"{dataset.prefix} is a whole .bin without shards; nothing to join")
    total = sum(path.stat().st_size for path in shards)
    expected = last_byte(dataset)
    if total != expected:
        raise DataError(
            f"{dataset.prefix}: the shards have {total} bytes, but the documents of the .idx end at"
            f" byte {expected}; download the missing shards or the right .idx"
        )
    base = Path(dataset.prefix)
    if output is not None:
        base = Path(output) / base.name
        refuse_other_neighbours(dataset.prefix, base)
    record = read_record(dataset.prefix) or {}
    for name, file in recorded_files(str(dataset.prefix), record).items():
        # Absent side files are nobody's damage: shards are often copied with their .idx alone.
        if name != ".bin" and file.size is not None and (fault := fault_of(file)):
            raise DataError(f"{file.paths[0]}: {fault}")
    joined = join_shards(
        shards,
        base.with_name(base.name + ".bin"),
        hashes=hashes,
        sha256=record.get("bin_sha256"),
        on_bytes=on_bytes,
    )
    copy_neighbours(dataset.prefix, base)
    return joined


def refuse_other_neighbours(source: str | os.PathLike[str], target: Path) -> None:
    """Refuse to put the .idx of one token file beside another's tokens.

    Raises  ConfigError naming the file that differs.
    """
    for suffix in (".idx", ".json"):
        own = Path(str(source) + suffix)
        other = target.with_name(target.name + suffix)
        if own.exists() and other.exists() and not cmp(own, other, shallow=False):
            raise ConfigError(
                f"{other} exists and is not that of {source}; remove the token file there, or"
                " choose another --output"
            )


def copy_neighbours(source: str | os.PathLike[str], target: Path) -> None:
    """Copy all files of one prefix but its tokens beside others; the record last."""
    record = read_record(source) or {}
    names = [name for name in recorded_files(str(source), record) if name not in (".bin", ".idx")]
    for name in (".idx", *names, ".json"):
        copy_beside(path_of(str(source), name), path_of(str(target), name))


def last_byte(dataset: IndexedDataset) -> int:
    """The offset at which the last document ends in the .bin.

    The maximum over all documents: an .idx may list them in another order than the .bin.
    """
    last = 0
    width = dataset.dtype.itemsize
    for start in range(0, len(dataset), CHUNK_DOCUMENTS):
        stop = start + CHUNK_DOCUMENTS
        ends = dataset.pointers[start:stop] + dataset.sizes[start:stop].astype("i8") * width
        last = max(last, int(ends.max()))
    return last
