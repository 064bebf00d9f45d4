"""A whole token file to Pythia's shards and back, with its .idx and its record."""

import os
from collections.abc import Mapping
from pathlib import Path

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import IndexedDataset
from castalia.data.shards import SHARD_BYTES, Joined, OnBytes, copy_beside, cut, find_shards, join

PIECE = 1 << 20


def shard(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    size: int = SHARD_BYTES,
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Cut PREFIX.bin into shards of `size` bytes in the folder `output`; PREFIX.idx and PREFIX.json go along.

    The same call again keeps the shards that are right. Returns the shards.
    Raises  DataError if the token file is damaged; ConfigError if it is in shards already; see `shards.cut`.
    """
    dataset = IndexedDataset(prefix)
    if dataset.shards:
        raise ConfigError(
            f"{dataset.prefix}: is in {len(dataset.shards)} shards already; unshard it first"
        )
    base = Path(dataset.prefix).name
    written = cut(dataset.bin_path, base, output, size, on_bytes)
    copy_neighbours(dataset.prefix, Path(output) / base)
    return written


def unshard(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> Joined:
    """Join the shards of a prefix as `output`/BASE.bin, by default beside them; .idx and .json go along.

    Interrupted, the same call goes on; done, it compares. `hashes` are SHA-256 by name, such as Pythia's list.
    Raises  DataError if a shard is missing, has another size or hash, or if the shards end before or after the last
            document; ConfigError if the .bin is there with other bytes; see `shards.join`.
    """
    dataset = IndexedDataset(prefix)
    shards = dataset.shards or find_shards(dataset.prefix)
    if not shards:
        raise ConfigError(
            f"{dataset.prefix}: one whole .bin and no shards; there is nothing to join"
        )
    total, expected = sum(path.stat().st_size for path in shards), last_byte(dataset)
    if total != expected:
        raise DataError(
            f"{dataset.prefix}: the shards have {total} bytes, but the documents of the .idx end at {expected}"
        )
    base = Path(dataset.prefix) if output is None else Path(output) / Path(dataset.prefix).name
    done = join(shards, base.with_name(base.name + ".bin"), hashes=hashes, on_bytes=on_bytes)
    copy_neighbours(dataset.prefix, base)
    return done


def copy_neighbours(source: str | os.PathLike[str], target: Path) -> None:
    """The .idx and .json of a prefix to another."""
    for suffix in (".idx", ".json"):
        copy_beside(Path(str(source) + suffix), target.with_name(target.name + suffix))


def last_byte(dataset: IndexedDataset) -> int:
    """Where the last document ends in the .bin."""
    if not len(dataset):
        return 0
    ends = (
        dataset.pointers[i : i + PIECE]
        + dataset.sizes[i : i + PIECE].astype("i8") * dataset.dtype.itemsize
        for i in range(0, len(dataset), PIECE)
    )
    return max(int(piece.max()) for piece in ends)
