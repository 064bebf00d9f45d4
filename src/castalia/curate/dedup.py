"""Removal of duplicate documents: equal ones by SHA-256, near ones by MinHash and true overlap."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write, several
from castalia.corpus.provenance import OWN, SUFFIX, arrow, plain, write_index
from castalia.curate.joining import input_facts
from castalia.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    require_tokens,
    without_suffix,
)
from castalia.data.shards import OnBytes
from castalia.data.sidecar import (
    close_with_record,
    refuse_inputs,
    refuse_to_replace,
    tokenizer_facts,
)

KEY_BYTES = 16
"""Bytes kept of a document's SHA-256. Among 10^9 documents, two different ones share a key with
probability 10^-21."""
CHUNK_SHINGLES = 4096
"""Shingles added to a signature at a time; datasketch holds `permutations` numbers for each."""
REPORT = ".dropped.jsonl"


@dataclass(frozen=True)
class Near:
    """The definition of near duplicates: sets of token n-grams that overlap by `threshold` or more.

    threshold     Jaccard index, |A and B| / |A or B|, in (0, 1).
    ngram         Tokens of a shingle; a shorter document is one shingle.
    permutations  Hash functions of a signature. More of them find more pairs near the threshold
                  and take more time.
    """

    threshold: float
    ngram: int = 5
    permutations: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"--near {self.threshold}: expected a Jaccard index between 0 and 1, such as 0.8"
            )
        if self.ngram < 1 or self.permutations < 2:
            raise ConfigError(
                f"--ngram {self.ngram}, --permutations {self.permutations}: expected at least 1 and"
                " at least 2"
            )


@dataclass(frozen=True)
class Match:
    """An earlier document, its Jaccard index with this one, and whether all tokens are equal."""

    number: int
    jaccard: float
    equal: bool = False


class KeptDocuments:
    """The documents kept so far. Documents are numbered through all of `datasets` in order.

    Memory  About 120 bytes a document; with `near` about 2 kB more. Texts are read again from the
            token files, never held.
    """

    def __init__(self, datasets: Sequence[IndexedDataset], near: Near | None) -> None:
        self.datasets = list(datasets)
        self.near = near
        self.starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        """The number of each dataset's first document."""
        self.first_of_key: dict[bytes, int] = {}
        self.near_matches: dict[int, Match] = {}
        if near is not None:
            sketch = require("datasketch", "dedup", "dedup --near")
            self.empty = sketch.MinHash(num_perm=near.permutations, hashfunc=int)
            # Weights against false negatives: every candidate is compared exactly, so a false
            # positive costs only time, while a missed candidate stays in the corpus.
            self.index = sketch.MinHashLSH(near.threshold, near.permutations, weights=(0.1, 0.9))

    def locate(self, number: int) -> tuple[IndexedDataset, int]:
        """Dataset of a document, and its position there."""
        file = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.datasets[file], number - int(self.starts[file])

    def match(self, number: int) -> Match | None:
        """The kept document that document `number` repeats; None keeps this one as well."""
        dataset, position = self.locate(number)
        tokens = dataset[position]
        # As int64, so that files of different dtypes have equal keys for equal tokens.
        key = hashlib.sha256(tokens.astype("<i8").tobytes()).digest()[:KEY_BYTES]
        first = self.first_of_key.setdefault(key, number)
        if first != number:
            # An equal document that was itself dropped as a near duplicate: name the kept one.
            return self.near_matches.get(first, Match(first, 1.0, equal=True))
        if self.near is None or not tokens.size:
            return None
        match = self.near_match(number, tokens, self.near)
        if match is not None:
            self.near_matches[number] = match
        return match

    def near_match(self, number: int, tokens: NDArray[Any], near: Near) -> Match | None:
        """The most similar kept document at or above the threshold; the first of equals."""
        own = np.unique(shingles(tokens, near.ngram))
        signature = self.empty.copy()
        for start in range(0, len(own), CHUNK_SHINGLES):
            # MinHash works on 32-bit hashes: the upper half of ours.
            hashes = own[start : start + CHUNK_SHINGLES] >> np.uint64(32)
            signature.update_batch(hashes.tolist())
        best = None
        for other in sorted(self.index.query(signature)):
            dataset, position = self.locate(other)
            overlap = jaccard(own, np.unique(shingles(dataset[position], near.ngram)))
            if overlap >= near.threshold and (best is None or overlap > best.jaccard):
                best = Match(other, overlap)
        if best is None:
            self.index.insert(number, signature)
        return best


def shingles(tokens: NDArray[Any], ngram: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each token n-gram, (n - ngram + 1,); one of all tokens if n < ngram, (1,).

    A polynomial in the golden ratio's multiplier 0x9E37…, then the finalizer of MurmurHash3
    (fmix64), which spreads it over all bits.
    """
    ids = tokens.astype(np.uint64)
    width = min(ngram, len(ids))
    count = len(ids) - width + 1
    hashes = np.full(count, width, np.uint64)
    for i in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : count + i] + np.uint64(1)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(multiplier)
    return hashes ^ (hashes >> np.uint64(33))


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Jaccard index of two sorted sets: |A and B| / |A or B|."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def dedup(
    prefixes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    near: Near | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Write the documents of token files without repetitions; returns the record.

    Of equal documents the first is kept, in the order of the inputs. With `near` a document is
    also dropped if it overlaps with a kept one by the threshold. Each sequence of a file counts as
    one document. OUTPUT.dropped.jsonl has a line for each dropped document: its position, the kept
    document that it repeats, and their overlap. The document index is filtered along.

    Time    One pass over the inputs; `near` reads each candidate once more.
    Raises  DataError if the inputs' dtypes or tokenizers differ; ConfigError if the output is an
            input, or holds token files of another job and is not to be overwritten.
    """
    datasets = [IndexedDataset(prefix) for prefix in several(prefixes)]
    if not datasets:
        raise ConfigError("nothing to deduplicate; name at least one PREFIX")
    require_alike(datasets)
    prefix = without_suffix(output)
    refuse_inputs(prefix, datasets)
    facts = tokenizer_facts(datasets)
    job = {"inputs": input_facts(datasets), "near": None if near is None else vars(near)}
    refuse_to_replace(prefix, {"dedup": job}, overwrite)
    documents = KeptDocuments(datasets, near)
    kept = [np.ones(len(dataset), np.bool_) for dataset in datasets]
    dropped = {"equal": 0, "near": 0}
    with IndexedDatasetWriter(prefix, datasets[0].dtype) as writer:
        with atomic_write(prefix + REPORT) as report:
            for file, dataset in enumerate(datasets):
                for position in range(len(dataset)):
                    match = documents.match(int(documents.starts[file]) + position)
                    if match is None:
                        writer.add(dataset[position])
                    else:
                        kept[file][position] = False
                        dropped["equal" if match.equal else "near"] += 1
                        line = report_line(dataset, position, match, documents)
                        report.write(json.dumps(line, ensure_ascii=False) + "\n")
                    if on_bytes:
                        on_bytes(int(dataset.sizes[position]) * dataset.dtype.itemsize)
        filter_indexes(prefix, datasets, kept)
        summary = {"dedup": {**job, "dropped": dropped}}
        return close_with_record(writer, prefix, {**facts, **summary}, (SUFFIX, REPORT))


def require_alike(datasets: Sequence[IndexedDataset]) -> None:
    """Require tokens of one dtype in all inputs.

    Raises  DataError naming the input that differs.
    """
    for dataset in datasets:
        require_tokens(dataset)
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype}, but {datasets[0].prefix} holds"
                f" {datasets[0].dtype}; prepare both with the same tokenizer"
            )


def report_line(
    dataset: IndexedDataset, position: int, match: Match, documents: KeptDocuments
) -> dict[str, Any]:
    """The report's line for one dropped document."""
    kept_dataset, kept_position = documents.locate(match.number)
    return {
        "prefix": dataset.prefix,
        "document": position,
        "tokens": int(dataset.sizes[position]),
        "repeats": {"prefix": kept_dataset.prefix, "document": kept_position},
        "jaccard": match.jaccard,
        "equal": match.equal,
    }


def filter_indexes(
    prefix: str, datasets: Sequence[IndexedDataset], kept: Sequence[NDArray[np.bool_]]
) -> None:
    """Write the document index of the kept documents, if every input has one.

    Otherwise an older index at `prefix` is removed: it would describe other documents.
    """
    paths = [Path(dataset.prefix + SUFFIX) for dataset in datasets]
    target = Path(prefix + SUFFIX)
    if not all(path.exists() for path in paths):
        target.unlink(missing_ok=True)
        return
    pyarrow, parquet = arrow()
    try:
        names: dict[str, None] = {}  # metadata columns of all inputs, in order of appearance
        for path in paths:
            names |= dict.fromkeys(
                name for name in parquet.read_schema(path).names if name not in OWN
            )
        columns = list(names)
        with atomic_write(target, "wb") as file:
            tables = (
                plain(pyarrow, table, columns)
                for path, mask in zip(paths, kept, strict=True)
                for table in filtered_groups(path, mask)
            )
            write_index(file, tables, columns)
    except (pyarrow.ArrowException, KeyError) as error:
        raise DataError(
            f"{', '.join(map(str, paths))}: cannot read a document index: {error}; remove it or"
            " prepare again"
        ) from None


def filtered_groups(path: Path, kept: NDArray[np.bool_]) -> Iterator[Any]:
    """The kept entries of a document index, a row group at a time."""
    pyarrow, parquet = arrow()
    with parquet.ParquetFile(path) as index:
        entries = index.metadata.num_rows
        if entries != len(kept):
            raise DataError(
                f"{path} describes {entries} documents, but the token file has {len(kept)}; remove"
                " it or prepare again"
            )
        start = 0
        for group in range(index.num_row_groups):
            table = index.read_row_group(group)
            yield table.filter(pyarrow.array(kept[start : start + table.num_rows]))
            start += table.num_rows


def read_report(prefix: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of OUTPUT.dropped.jsonl."""
    with open(without_suffix(prefix) + REPORT, encoding="utf-8") as file:
        yield from map(json.loads, file)
