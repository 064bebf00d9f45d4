"""What the data of a run are: sizes, content hashes and order settings; kept with every checkpoint."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.files import sha256_of
from castalia.data.indexed import IndexedDataset
from castalia.data.mapped import Buffer, map_file

FULL_BYTES = 64 << 20
"""A .bin or .idx up to this size is hashed whole."""
BLOCK_BYTES = 1 << 20
BLOCKS = 64
"""Of a larger one, so many blocks of 1 MiB, evenly spaced, the first and the last among them."""
PIECE_BYTES = 16 << 20
"""What one core hashes at a time."""


def fingerprint(
    train: Sequence[IndexedDataset],
    valid: Sequence[IndexedDataset] = (),
    *,
    order: Mapping[str, Any],
) -> dict[str, Any]:
    """A JSON dict that two runs share when they serve the same rows in the same order.

    `order` holds the settings that decide the order (seed, seq_length, split, weights, epochs, batch_size …). Paths
    are not compared by `changed`; file names only serve its sentences.
    """
    return {
        "version": 1,
        "train": [contents(dataset) for dataset in train],
        "valid": [contents(dataset) for dataset in valid],
        "order": dict(order),
    }


def contents(dataset: IndexedDataset) -> dict[str, Any]:
    """Sizes and hashes of one token file."""
    how, digest = bin_hash(dataset.buffer)
    return {
        "name": Path(dataset.prefix).name,
        "documents": len(dataset),
        "tokens": int(dataset.sizes.sum(dtype="int64")),
        "dtype": dataset.dtype.name,
        "idx_sha256": idx_hash(dataset),
        "bin_bytes": len(dataset.buffer),
        "bin_hashed": how,
        "bin_sha256": digest,
    }


def idx_hash(dataset: IndexedDataset) -> str:
    """Hex SHA-256 of an .idx; of a large one, of all its sizes and of blocks of it, for its places follow from them."""
    if dataset.idx_path.stat().st_size <= FULL_BYTES:
        return sha256_of(dataset.idx_path)
    return hashlib.sha256(
        (array_hash(dataset.sizes) + bin_hash(dataset.idx_path)[1]).encode()
    ).hexdigest()


def array_hash(array: NDArray[Any]) -> str:
    """Hex SHA-256 of dtype, shape and the SHA-256 of each piece of the numbers; all cores work on it.

    Time    about 0.5 s a GB and core.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    pieces = (flat[start : start + PIECE_BYTES] for start in range(0, len(flat), PIECE_BYTES))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(lambda piece: hashlib.sha256(piece).hexdigest(), pieces))
    return hashlib.sha256(json.dumps([array.dtype.str, array.shape, hashes]).encode()).hexdigest()


def bin_hash(source: Path | Buffer) -> tuple[str, str]:
    """How a .bin is hashed, and its hex SHA-256 under that rule; shards give what the whole file gives."""
    data = map_file(source) if isinstance(source, Path) else source
    size = len(data)
    if size <= FULL_BYTES:
        how, starts = "whole", list(range(0, size, BLOCK_BYTES))
    else:
        how = f"{BLOCKS} evenly spaced blocks of {BLOCK_BYTES} bytes"
        starts = [(size - BLOCK_BYTES) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    digest = hashlib.sha256()
    for start in starts:
        digest.update(data[start : start + BLOCK_BYTES])
    return how, digest.hexdigest()


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One sentence for each difference that changes the rows or their order; empty if there is none."""
    sentences = []
    for role in ("train", "valid"):
        before, after = old.get(role, []), new.get(role, [])
        if len(before) != len(after):
            sentences.append(f"{role}: {len(before)} sources before, {len(after)} now")
            continue
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            sentences += source_changes(f"{role} source {i} ({b.get('name')})", a, b)
    before, after = old.get("order", {}), new.get("order", {})
    for key in [*before, *(key for key in after if key not in before)]:
        if before.get(key) != after.get(key):
            why = " passes over the data (train.steps decides)" if key == "epochs" else ""
            sentences.append(f"order: {key} was {before.get(key)}, is {after.get(key)}{why}")
    return sentences


def source_changes(label: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of one source: its sizes, or else its contents."""
    sizes = [key for key in ("documents", "tokens", "dtype") if old.get(key) != new.get(key)]
    if sizes:
        return [f"{label}: {key} was {old.get(key)}, is {new.get(key)}" for key in sizes]
    hashes = ("idx_sha256", "bin_bytes", "bin_hashed", "bin_sha256")
    if any(old.get(key) != new.get(key) for key in hashes):
        return [f"{label}: its contents differ (same sizes, other hash)"]
    return []
