"""The fingerprint of a run's data: sizes, content hashes and settings of the order. Every
checkpoint holds it."""

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
from castalia.data.mapped import Buffer, MappedFile

FULL_BYTES = 64 << 20
"""A .bin or .idx up to this size is hashed whole."""
BLOCK_BYTES = 1 << 20
BLOCKS = 64
"""Number of blocks hashed of a larger file, evenly spaced, the first and the last included."""
CHUNK_BYTES = 16 << 20
"""Bytes that one thread hashes at a time. Part of the definition of `array_hash`."""
PASS_BY_PASS = ("rows as in the file", "neox best_fit", "neox best_fit, none too long")
"""Orders, by their kind, that shuffle each pass over the data for itself, if at all."""
THREADS = 8
"""Most threads that hash at once."""


def fingerprint(
    train: Sequence[IndexedDataset],
    valid: Sequence[IndexedDataset] = (),
    *,
    order: Mapping[str, Any],
) -> dict[str, Any]:
    """A JSON dict that is equal for two runs that serve the same rows in the same order.

    `order` holds the settings that decide the order: seed, seq_length, split, weights, epochs,
    batch_size and so on. Paths do not enter; `changed` uses the file names in its sentences only.
    """
    return {
        "version": 1,
        "train": [contents(dataset) for dataset in train],
        "valid": [contents(dataset) for dataset in valid],
        "order": dict(order),
    }


def of_training(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint that the rows of training depend on."""
    found = {key: value for key, value in fingerprint.items() if not key.startswith("valid")}
    order = found.get("order", {})
    return found | {"order": {key: order[key] for key in order if key != "valid_weights"}}


def contents(dataset: IndexedDataset) -> dict[str, Any]:
    """Sizes and hashes of one token file."""
    rule, digest = bin_hash(dataset.buffer)
    return {
        "name": Path(dataset.prefix).name,
        "documents": len(dataset),
        "tokens": int(dataset.sizes.sum(dtype="int64")),
        "dtype": dataset.dtype.name,
        "idx_sha256": idx_hash(dataset),
        "bin_bytes": len(dataset.buffer),
        "bin_hashed": rule,
        "bin_sha256": digest,
    }


def idx_hash(dataset: IndexedDataset) -> str:
    """Hex SHA-256 of an .idx; of a large one, of all its sizes and of blocks of it."""
    if dataset.idx_path.stat().st_size <= FULL_BYTES:
        return sha256_of(dataset.idx_path)
    blocks = bin_hash(dataset.idx_path)[1]
    return hashlib.sha256((array_hash(dataset.sizes) + blocks).encode()).hexdigest()


def array_hash(array: NDArray[Any]) -> str:
    """Hex SHA-256 of dtype, shape and the SHA-256 of each chunk, computed on several cores.

    Time    about 0.5 s per GB and core.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    chunks = (flat[start : start + CHUNK_BYTES] for start in range(0, len(flat), CHUNK_BYTES))
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(lambda chunk: hashlib.sha256(chunk).hexdigest(), chunks))
    return hashlib.sha256(json.dumps([array.dtype.str, array.shape, hashes]).encode()).hexdigest()


def bin_hash(source: Path | Buffer) -> tuple[str, str]:
    """The hashing rule for a .bin and its hex SHA-256; shards hash like the whole file."""
    data = MappedFile(source) if isinstance(source, Path) else source
    size = len(data)
    if size <= FULL_BYTES:
        rule = "whole"
        starts = list(range(0, size, BLOCK_BYTES))
    else:
        rule = f"{BLOCKS} evenly spaced blocks of {BLOCK_BYTES} bytes"
        starts = [(size - BLOCK_BYTES) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    digest = hashlib.sha256()
    for start in starts:
        digest.update(data[start : start + BLOCK_BYTES])
    return rule, digest.hexdigest()


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One sentence for each difference that changes the rows or their order."""
    sentences = []
    for role in ("train", "valid", "rejected", "valid_rejected"):
        sources = old.get(role, [])
        now = new.get(role, [])
        if len(sources) != len(now):
            sentences.append(f"{role}: {len(sources)} sources before, {len(now)} now")
            continue
        for number, (before, after) in enumerate(zip(sources, now, strict=True)):
            label = f"{role} source {number} ({after.get('name')})"
            sentences += source_changes(label, before, after)
    if old.get("interventions") != new.get("interventions"):
        # Hashes: what an intervention does has no short name.
        hashes = [str(values.get("interventions", "none"))[:12] for values in (old, new)]
        sentences.append(
            f"data.interventions were {hashes[0]}, are {hashes[1]} (a branch may have others:"
            " model.start, train.start_optimizer and train.start_step)"
        )
    return sentences + order_changes(old.get("order", {}), new.get("order", {}))


def source_changes(label: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between two descriptions of one source: its sizes, or else its contents."""
    sizes = [key for key in ("documents", "tokens", "dtype") if old.get(key) != new.get(key)]
    if sizes:
        # Other sizes mean other hashes, so these add nothing.
        return [f"{label}: {key} was {old.get(key)}, is {new.get(key)}" for key in sizes]
    hashes = ("idx_sha256", "bin_bytes", "bin_hashed", "bin_sha256")
    if any(old.get(key) != new.get(key) for key in hashes):
        return [f"{label}: contents differ (same sizes, different hash)"]
    return []


def is_longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether more passes leave the rows of the earlier ones in their places."""
    passes = [order.get("epochs") or [] for order in (old, new)]
    # A source that was left out has no row that could keep its place.
    same_sources = [count == 0 for count in passes[0]] == [count == 0 for count in passes[1]]
    return same_sources and old.get("kind") == new.get("kind") in PASS_BY_PASS


def order_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between the settings of two orders."""
    sentences = []
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) == new.get(key) or (key == "epochs" and is_longer(old, new)):
            continue
        if key == "rows" and key not in old:
            continue  # checkpoints of older versions do not have it
        note = ""
        if key == "rows":
            note = " (train.steps decides): this packing shuffles all rows together"
        if key == "epochs":
            note = " passes over the data (train.steps decides)"
            note += ": the documents of all passes are shuffled together"
            if 0 in (new.get(key) or []):
                note += "; 0 is a source left out"
        sentences.append(f"order: {key} was {old.get(key)}, is {new.get(key)}{note}")
    return sentences
