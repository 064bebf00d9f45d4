"""Checks of token files: structure, record and hashes, every finding by file; nothing stops at the first one."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from castalia.core.errors import DataError
from castalia.core.files import CHUNK_BYTES, several
from castalia.corpus.provenance import NO_INDEX, SUFFIX, index_fault
from castalia.curate.joining import boundaries_fit
from castalia.data.indexed import IndexedDataset, without_suffix
from castalia.data.mapped import view
from castalia.data.shards import SHARD_BYTES, SHARD_NAME, OnBytes, base_of, hash_span
from castalia.data.sidecar import read_record

HEX = re.compile(r"[0-9a-fA-F]{64}")
PIECE = 1 << 20


@dataclass(frozen=True)
class Check:
    """One finding: `file` as the user knows it, what was looked at, and the sentence about what is wrong, if anything.

    `about` is `structure`, `record`, `index`, `ids` or `hash`.
    """

    file: str
    about: str
    wrong: str | None = None

    @property
    def ok(self) -> bool:
        """Whether all is right."""
        return self.wrong is None


def read_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 by file name out of a list, one file a line: `name hash` as Pythia's, or `hash  name` as sha256sum's.

    Raises  DataError with the line that is neither, or that gives a name a second hash; also if the list is empty.
    """
    hashes: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of hashes cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        first, _, rest = line.strip().partition(" ")
        name, found = (
            (rest.strip().lstrip("*"), first) if HEX.fullmatch(first) else (first, rest.strip())
        )
        if not name or not HEX.fullmatch(found):
            raise DataError(
                f"{path}:{number}: expected a file name and its SHA-256 in 64 hex digits, got {line!r}"
            )
        name = Path(name).name
        if hashes.setdefault(name, found.lower()) != found.lower():
            raise DataError(f"{path}:{number}: a second, other hash of {name}")
    if not hashes:
        raise DataError(f"{path}: the list of hashes is empty")
    return hashes


def verify(
    prefixes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    hashes: Mapping[str, str] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes | None = None,
) -> Iterator[Check]:
    """Check token files; gives every finding, good or bad, as it comes.

    Structure: both files whole, documents back to back, doc_idx from first to last, nothing after the last document.
    Index of documents, where there is one: as many tokens a document as the .idx says.
    Record, where PREFIX.json is there: counts, dtype, the hash of the .bin, ids within the vocabulary.
    Hashes, with a list: every file of the prefix that the list names must be there and have its hash, every file of
    the prefix that is there must be named. A list of shards also serves for the whole .bin, `shard_bytes` at a time.
    """
    for prefix in several(prefixes):
        base = base_of(without_suffix(prefix))
        try:
            dataset = IndexedDataset(base)
        except DataError as error:
            yield Check(base, "structure", str(error))
        else:
            yield Check(base, "structure", structure_fault(dataset))
            yield from record_checks(dataset, on_bytes)
            if (wrong := index_fault(dataset.prefix, dataset.sizes)) is not NO_INDEX:
                yield Check(dataset.prefix + SUFFIX, "index", wrong or None)
        if hashes is not None:
            yield from hash_checks(Path(base), hashes, shard_bytes, on_bytes)


def structure_fault(dataset: IndexedDataset) -> str | None:
    """What is wrong with the places of documents, if anything, beyond what opening a file finds."""
    width, expected = dataset.dtype.itemsize, 0
    for start in range(0, len(dataset), PIECE):
        sizes = dataset.sizes[start : start + PIECE].astype(np.int64) * width
        ends = expected + np.cumsum(sizes)
        wrong = np.flatnonzero(dataset.pointers[start : start + PIECE] != ends - sizes)
        if len(wrong):
            i = start + int(wrong[0])
            place = int((ends - sizes)[wrong[0]])
            return (
                f"{dataset.idx_path} places document {i} at byte {dataset.pointers[i]}, but the one before it ends at"
                f" {place}: documents overlap or leave a gap"
            )
        expected = int(ends[-1])
    if expected != len(dataset.buffer):
        return f"{dataset.prefix}.bin goes on for {len(dataset.buffer) - expected} bytes after the last document"
    if not boundaries_fit(dataset):
        return (
            f"{dataset.idx_path}: doc_idx does not lead from 0 to {len(dataset)} (GPT-NeoX's merge leaves it so;"
            " training does not use it, `castalia data merge` writes it right)"
        )
    return None


def record_checks(dataset: IndexedDataset, on_bytes: OnBytes | None) -> Iterator[Check]:
    """Findings about PREFIX.json, if there is one."""
    name = f"{dataset.prefix}.json"
    try:
        record = read_record(dataset.prefix)
    except DataError as error:
        yield Check(name, "record", str(error))
        return
    if record is None:
        return
    found = {
        "documents": len(dataset),
        "tokens": int(dataset.sizes.sum(dtype=np.int64)),
        "dtype": dataset.dtype.name,
    }
    wrong = [
        f"{key} is {value}, recorded {record.get(key)}"
        for key, value in found.items()
        if record.get(key) != value
    ]
    yield Check(name, "record", "; ".join(wrong) or None)
    if isinstance(vocab_size := record.get("vocab_size"), int):
        yield Check(f"{dataset.prefix}.bin", "ids", vocabulary_fault(dataset, vocab_size))
    if isinstance(recorded := record.get("bin_sha256"), str):
        digest = hashlib.sha256()
        for start in range(0, len(dataset.buffer), CHUNK_BYTES):
            digest.update(piece := dataset.buffer[start : start + CHUNK_BYTES])
            if on_bytes:
                on_bytes(len(piece))
        yield Check(f"{dataset.prefix}.bin", "hash", hash_fault(digest.hexdigest(), recorded))


def vocabulary_fault(dataset: IndexedDataset, vocab_size: int) -> str | None:
    """The first stretch of tokens with an id outside the recorded vocabulary, if there is one."""
    width = dataset.dtype.itemsize
    total = len(dataset.buffer) // width
    for start in range(0, total, PIECE):
        piece = view(dataset.buffer, dataset.dtype, min(PIECE, total - start), start * width)
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= vocab_size:
            return f"token id {high if low >= 0 else low}, but the recorded vocabulary has {vocab_size} ids"
    return None


def hash_fault(found: str, expected: str) -> str | None:
    """The sentence about a hash that differs."""
    return (
        None
        if found == expected
        else f"SHA-256 {found}, expected {expected}: copy or prepare it again"
    )


def hash_checks(
    base: Path, hashes: Mapping[str, str], shard_bytes: int, on_bytes: OnBytes | None
) -> Iterator[Check]:
    """Findings about the listed hashes of one prefix's files."""
    whole = base.with_name(base.name + ".bin")
    listed = sorted(name for name in hashes if belongs(name, base.name))
    if not listed:
        yield Check(str(base), "hash", "the list of hashes names no file of this prefix")
    spans_cover_whole = False
    for name in listed:
        path, span = base.with_name(name), SHARD_NAME.fullmatch(name)
        if path.exists():
            yield Check(
                str(path),
                "hash",
                hash_fault(hash_span(path, 0, path.stat().st_size, on_bytes), hashes[name]),
            )
        elif span and whole.exists():
            spans_cover_whole = True
            start = int(span["number"]) * shard_bytes
            stop = whole.stat().st_size if span["number"] == span["last"] else start + shard_bytes
            found = hash_span(whole, start, stop, on_bytes)
            yield Check(f"{whole} as {name}", "hash", hash_fault(found, hashes[name]))
        else:
            yield Check(str(path), "hash", "missing")
    for path in sorted(present(base)):
        if path.name not in hashes and not (path == whole and spans_cover_whole):
            yield Check(str(path), "hash", "is there, but the list of hashes does not name it")


def belongs(name: str, base: str) -> bool:
    """Whether a file name is the .bin, .idx or .json of a prefix, or one of its shards."""
    return name in {base + ".bin", base + ".idx", base + ".json"} or (
        base_of(name) == base and name != base
    )


def present(base: Path) -> list[Path]:
    """The prefix's .bin, .idx and shards that are there."""
    folder = base.parent
    found = (
        [path for path in folder.glob("*.bin") if belongs(path.name, base.name)]
        if folder.is_dir()
        else []
    )
    index = base.with_name(base.name + ".idx")
    return [*found, index] if index.exists() else found


def hash_list(prefix: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> dict[str, str]:
    """SHA-256 by name of the prefix's .bin or shards and its .idx, to publish beside them.

    Raises  DataError if none of them is there.
    """
    found = sorted(present(Path(base_of(without_suffix(prefix)))))
    if not found:
        raise DataError(f"{prefix}: no such token file")
    return {path.name: hash_span(path, 0, path.stat().st_size, on_bytes) for path in found}
