"""Damaged training files: those that a start reads whole anyway are compared before the first
step."""

from collections.abc import Iterator, Mapping
from typing import Any

from castalia.core.errors import DataError
from castalia.data.fingerprint import FULL_BYTES, contents
from castalia.data.indexed import IndexedDataset
from castalia.data.seals import path_of, recorded_files
from castalia.data.sidecar import read_record
from castalia.data.sources import Files

REMEDY = "copy or prepare the file again; data.verify=never reads it as it is"
"""How to go on from a damaged file."""


def require_whole(train: Files, valid: Files, fingerprint: Mapping[str, Any]) -> None:
    """Compare files of up to FULL_BYTES with the hashes that their records have.

    `fingerprint` is that of the files: the hashes of their tokens are there already.
    Raises  DataError naming the first that differs.
    """
    known: dict[str, Any] = {}
    for role, files in (("", train), ("valid_", valid)):
        sides = [(role.rstrip("_") or "train", files.tokens)]
        if files.rejected is not None:
            sides.append((f"{role}rejected", files.rejected.tokens))
        for name, tokens in sides:
            # Both parts of a split are described once.
            for dataset, facts in zip(tokens, fingerprint.get(name, ()), strict=False):
                known[dataset.prefix] = facts
    for dataset in datasets_of(train, valid):
        require_hashes(dataset, known.get(dataset.prefix))


def datasets_of(*sides: Files) -> Iterator[IndexedDataset]:
    """The files of some sides, each once."""
    datasets = {}
    for side in sides:
        for dataset in (*side.all_tokens, *side.beside):
            datasets[dataset.prefix] = dataset
    yield from datasets.values()


def require_hashes(dataset: IndexedDataset, facts: Mapping[str, Any] | None) -> None:
    """Compare the small files of one prefix with its record; `facts` are its hashes, if known.

    Raises  DataError.
    """
    recorded = recorded_files(dataset.prefix, read_record(dataset.prefix) or {})
    sizes = {".bin": len(dataset.buffer), ".idx": dataset.idx_path.stat().st_size}
    for name, size in sizes.items():
        # Of a larger one the fingerprint has blocks.
        if name not in recorded or size > FULL_BYTES:
            continue
        facts = facts or contents(dataset)
        if facts[f"{name[1:]}_sha256"] != recorded[name].sha256:
            raise DataError(damaged_sentence(dataset.prefix, name, recorded[name].by))


def damaged_sentence(prefix: str, name: str, by: str) -> str:
    """The sentence about a damaged file of a prefix; `by` is what has its hash."""
    return f"{path_of(prefix, name)} is damaged: its SHA-256 is not the one in {by}; {REMEDY}"
