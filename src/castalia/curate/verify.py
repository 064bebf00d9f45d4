"""Checks of token files: structure, record, document index and hashes.

Checks go on after a fault, so that one run reports all of them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castalia.core.errors import DataError
from castalia.core.files import several
from castalia.core.sealed import OWN_HASH
from castalia.corpus.provenance import NO_INDEX, REJECTS, SUFFIX, index_fault
from castalia.curate.dedup import REPORT
from castalia.curate.joining import boundaries_fit
from castalia.data.indexed import IndexedDataset, without_suffix
from castalia.data.seals import RecordedFile, fault_of, path_of, recorded_files
from castalia.data.shards import SHARD_BYTES, SHARD_NAME, OnBytes, base_of, hash_span
from castalia.data.sidecar import read_record

SHA256_HEX = re.compile(r"[0-9a-fA-F]{64}")
LIST = ".sha256"
"""Suffix of a list of hashes that lies beside a token file."""
SUFFIXES = (".bin", ".idx", SUFFIX, REJECTS, REPORT)
"""Files of a prefix that a record of an older version has no hash of."""
CHUNK = 1 << 20
"""Documents, or tokens, checked at a time: bounds the memory on files of 10^11 tokens."""


@dataclass(frozen=True)
class Check:
    """The result of one check: the file as the user knows it, the subject, and the fault if any.

    `about` is `structure`, `record`, `index`, `ids` or `hash`. `wrong` is a sentence, or None;
    `note` is one about a file that nothing is known of.
    """

    file: str
    about: str
    wrong: str | None = None
    note: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return self.wrong is None


def read_hashes(path: str | os.PathLike[str], *, with_folders: bool = False) -> dict[str, str]:
    """SHA-256 by file name, from a list of one file a line.

    A line is `name hash`, as in Pythia's list, or `hash  name`, as sha256sum writes. The folders
    of a name are left out, or kept by `with_folders`.
    Raises  DataError with the line that is neither or contradicts another; also for an empty list.
    """
    hashes: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list of hashes: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        first, _, rest = line.strip().partition(" ")
        if SHA256_HEX.fullmatch(first):
            digest = first
            name = rest.strip().lstrip("*")  # sha256sum marks binary mode with a star
        else:
            digest = rest.strip()
            name = first
        if not name or not SHA256_HEX.fullmatch(digest):
            raise DataError(
                f"{path}:{number}: expected a file name and its SHA-256 of 64 hex digits, got"
                f" {line!r}"
            )
        name = Path(name).as_posix() if with_folders else Path(name).name
        if hashes.setdefault(name, digest.lower()) != digest.lower():
            raise DataError(f"{path}:{number}: a second hash for {name}, different from the first")
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
    """Check token files; yields every result, passed or failed, as it comes.

    structure  Both files are whole, documents lie back to back, doc_idx spans all sequences, and
               nothing follows the last document.
    index      The document index, if there is one, has the .idx's number of tokens per document.
    record     Counts, dtype and vocabulary are those of PREFIX.json, if there is one, and it is as
               it was written.
    hash       Every file has the size and the hash that PREFIX.json has of it. With `hashes`, by
               default those in PREFIX.sha256 if there is one, every listed file of the prefix
               exists and has its hash, and every existing file is listed. A list of shards also
               checks a whole .bin, `shard_bytes` at a time.
    """
    for prefix in several(prefixes):
        base = base_of(without_suffix(prefix))
        record, wrong_record = record_of_prefix(base)
        try:
            dataset = IndexedDataset(base)
        except DataError as error:
            yield Check(base, "structure", str(error))
        else:
            yield Check(base, "structure", structure_fault(dataset))
            if record:
                yield from record_checks(dataset, record)
            wrong = index_fault(dataset.prefix, dataset.sizes)
            if wrong is not NO_INDEX:
                yield Check(dataset.prefix + SUFFIX, "index", wrong or None)
        if not record and not wrong_record and Path(base + SUFFIX).exists():
            wrong_record = f"is missing; it is written with every {SUFFIX[1:]}"
        if wrong_record:
            yield Check(f"{base}.json", "record", wrong_record)
        listed = hashes
        if listed is None and Path(base + LIST).is_file():
            listed = read_hashes(base + LIST)
        if listed is not None:
            yield from hash_checks(Path(base), listed, shard_bytes, on_bytes)
        yield from seal_checks(base, record, listed or {}, on_bytes)


def record_of_prefix(base: str) -> tuple[dict[str, Any], str | None]:
    """The record of a prefix, and what is wrong with it; {} without one."""
    try:
        return read_record(base) or {}, None
    except DataError as error:
        return {}, str(error)


def seal_checks(
    base: str, record: dict[str, Any], listed: Mapping[str, str], on_bytes: OnBytes | None
) -> Iterator[Check]:
    """Checks of every file that the record has the hash of, and a note on each that it has not."""
    try:
        recorded = recorded_files(base, record)
    except DataError:  # shards are missing, which the structure says
        recorded = {}
    for name, file in recorded.items():
        fault = fault_of(file, on_bytes if name == ".bin" else None)
        yield Check(str(path_of(base, name)), "hash", fault)
    if record and OWN_HASH not in record:
        yield Check(f"{base}.json", "hash", note="not covered: it does not have its own hash")
    for suffix in SUFFIXES:
        path = path_of(base, suffix)
        if suffix not in recorded and path.name not in listed and path.exists():
            yield Check(str(path), "hash", note=f"not covered: no {path.stem}.json has its hash")


def known_files(prefix: str) -> dict[str, RecordedFile]:
    """The files of a token file whose hash its record has, or else a list beside it.

    Raises  DataError if one of the two is damaged.
    """
    found = recorded_files(prefix, read_record(prefix) or {})
    beside = Path(prefix + LIST)
    if beside.is_file():
        for name, digest in read_hashes(beside).items():
            # A list of shards has a line for each.
            path = Path(prefix).with_name(name)
            suffix = path.suffix
            key = name if SHARD_NAME.fullmatch(name) else suffix
            if belongs(name, Path(prefix).name) and not (key == suffix and suffix in found):
                found[key] = RecordedFile((path,), None, digest, str(beside))
    return found


def structure_fault(dataset: IndexedDataset) -> str | None:
    """The first fault in the positions of the documents that opening the file does not detect."""
    width = dataset.dtype.itemsize
    expected = 0
    for start in range(0, len(dataset), CHUNK):
        sizes = dataset.sizes[start : start + CHUNK].astype(np.int64) * width
        ends = expected + np.cumsum(sizes)
        misplaced = np.flatnonzero(dataset.pointers[start : start + CHUNK] != ends - sizes)
        if len(misplaced):
            document = start + int(misplaced[0])
            previous_end = int((ends - sizes)[misplaced[0]])
            return (
                f"{dataset.idx_path} puts document {document} at byte {dataset.pointers[document]},"
                f" but the previous document ends at byte {previous_end}: documents overlap or"
                " leave a gap"
            )
        expected = int(ends[-1])
    if expected != len(dataset.buffer):
        surplus = len(dataset.buffer) - expected
        return f"{dataset.prefix}.bin has {surplus} bytes after the last document"
    if not boundaries_fit(dataset):
        return (
            f"{dataset.idx_path}: doc_idx does not run from 0 to {len(dataset)}, as in files merged"
            " by GPT-NeoX; training ignores it, `castalia data merge` rewrites it correctly"
        )
    return None


def record_checks(dataset: IndexedDataset, record: Mapping[str, Any]) -> Iterator[Check]:
    """Checks against PREFIX.json."""
    name = f"{dataset.prefix}.json"
    actual = {
        "documents": len(dataset),
        "tokens": int(dataset.sizes.sum(dtype=np.int64)),
        "dtype": dataset.dtype.name,
    }
    faults = [
        f"{key} is {value}, but the record says {record.get(key)}"
        for key, value in actual.items()
        if record.get(key) != value
    ]
    yield Check(name, "record", "; ".join(faults) or None)
    vocab_size = record.get("vocab_size")
    if isinstance(vocab_size, int):
        yield Check(f"{dataset.prefix}.bin", "ids", vocabulary_fault(dataset, vocab_size))


def vocabulary_fault(dataset: IndexedDataset, vocab_size: int) -> str | None:
    """The first chunk with a token id outside the recorded vocabulary, if any."""
    width = dataset.dtype.itemsize
    total = len(dataset.buffer) // width
    for start in range(0, total, CHUNK):
        tokens = dataset.buffer.view(dataset.dtype, min(CHUNK, total - start), start * width)
        lowest = int(tokens.min())
        highest = int(tokens.max())
        if lowest < 0 or highest >= vocab_size:
            wrong = highest if lowest >= 0 else lowest
            return f"token id {wrong} is outside the recorded vocabulary of {vocab_size} ids"
    return None


def hash_fault(actual: str, expected: str) -> str | None:
    """The sentence about a wrong hash; None if it is right."""
    if actual == expected:
        return None
    return f"SHA-256 is {actual}, expected {expected}; copy or prepare the file again"


def hash_checks(
    base: Path, hashes: Mapping[str, str], shard_bytes: int, on_bytes: OnBytes | None
) -> Iterator[Check]:
    """Checks of one prefix's files against a list of hashes."""
    whole = base.with_name(base.name + ".bin")
    listed = sorted(name for name in hashes if belongs(name, base.name))
    if not listed:
        yield Check(str(base), "hash", "the list of hashes names none of this prefix's files")
    checked_as_shards = False
    # Sorted, so that two runs print the same report.
    for name in listed:
        path = base.with_name(name)
        shard = SHARD_NAME.fullmatch(name)
        if path.exists():
            digest = hash_span(path, 0, path.stat().st_size, on_bytes)
            yield Check(str(path), "hash", hash_fault(digest, hashes[name]))
        elif shard and whole.exists():
            # The list is of shards, but they were joined: hash the shard's span of the whole.
            checked_as_shards = True
            start = int(shard["number"]) * shard_bytes
            stop = start + shard_bytes
            if shard["number"] == shard["last"]:
                stop = whole.stat().st_size
            digest = hash_span(whole, start, stop, on_bytes)
            yield Check(f"{whole} as {name}", "hash", hash_fault(digest, hashes[name]))
        else:
            yield Check(str(path), "hash", "the list of hashes names it, but it is missing")
    for path in sorted(existing_files(base)):
        if path.name not in hashes and not (path == whole and checked_as_shards):
            yield Check(str(path), "hash", "the list of hashes does not name it")


def belongs(name: str, base: str) -> bool:
    """Whether a file name is the .bin, .idx or .json of a prefix, or one of its shards."""
    if name in (base + ".bin", base + ".idx", base + ".json"):
        return True
    return base_of(name) == base and name != base


def existing_files(base: Path) -> list[Path]:
    """The prefix's .bin or shards, and its .idx, as far as they exist."""
    paths: list[Path] = []
    if base.parent.is_dir():
        paths = [path for path in base.parent.glob("*.bin") if belongs(path.name, base.name)]
    index = base.with_name(base.name + ".idx")
    if index.exists():
        paths.append(index)
    return paths


def hash_list(prefix: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> dict[str, str]:
    """SHA-256 by name of the prefix's .bin or shards and its .idx, to be published with them.

    Raises  DataError if none of these files exists.
    """
    paths = sorted(existing_files(Path(base_of(without_suffix(prefix)))))
    if not paths:
        raise DataError(f"{prefix}: no such token file (neither .bin, nor shards, nor .idx)")
    return {path.name: hash_span(path, 0, path.stat().st_size, on_bytes) for path in paths}
