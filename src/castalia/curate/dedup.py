"""Duplicates out of token files: equal documents by their hash, nearly equal ones by MinHash and their true overlap."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write, several
from castalia.corpus.provenance import OWN, SUFFIX, arrow, plain, write_index
from castalia.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    require_tokens,
    without_suffix,
)
from castalia.data.shards import OnBytes
from castalia.data.sidecar import finish, refuse_inputs, tokenizer_facts

KEY_BYTES = 16
"""Of a document's SHA-256: at 10^9 documents, two that differ share it with probability 10^-21."""
PIECE_SHINGLES = 4096
REPORT = ".dropped.jsonl"


@dataclass(frozen=True)
class Near:
    """What counts as nearly equal: documents whose sets of n-grams of tokens overlap by `threshold` or more.

    threshold     Jaccard index, |A and B| / |A or B|, in (0, 1).
    ngram         tokens of a shingle; a shorter document is one shingle.
    permutations  hash functions of a signature: more find more of what lies near the threshold, and cost more time.
    """

    threshold: float
    ngram: int = 5
    permutations: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"--near {self.threshold}: a Jaccard index above 0 and below 1, for instance 0.8"
            )
        if self.ngram < 1 or self.permutations < 2:
            raise ConfigError(
                f"--ngram {self.ngram} and --permutations {self.permutations}: at least 1 and 2"
            )


@dataclass(frozen=True)
class Match:
    """The document that came before, how much of it is the same, and whether it is the same token for token."""

    number: int
    jaccard: float
    equal: bool = False


class Seen:
    """The documents kept so far, by place in `datasets` joined.

    Memory  about 120 bytes a document; with `near` about 2 kB more, and nothing of the texts themselves.
    """

    def __init__(self, datasets: Sequence[IndexedDataset], near: Near | None) -> None:
        self.datasets, self.near = list(datasets), near
        self.starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self.equal: dict[bytes, int] = {}
        self.near_matches: dict[int, Match] = {}
        if near is not None:
            sketch = require("datasketch", "dedup", "dedup --near")
            self.empty = sketch.MinHash(num_perm=near.permutations, hashfunc=int)
            # Candidates are looked at themselves, so too many of them cost time alone; one that is missed stays.
            self.index = sketch.MinHashLSH(near.threshold, near.permutations, weights=(0.1, 0.9))

    def place(self, number: int) -> tuple[IndexedDataset, int]:
        """File and place in it of a document."""
        file = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.datasets[file], number - int(self.starts[file])

    def match(self, number: int) -> Match | None:
        """The first kept document that this one repeats; None if there is none, and then this one is kept."""
        dataset, place = self.place(number)
        tokens = dataset[place]
        key = hashlib.sha256(tokens.astype("<i8").tobytes()).digest()[:KEY_BYTES]
        first = self.equal.setdefault(key, number)
        if first != number:  # and what it is near to, if it went itself
            return self.near_matches.get(first, Match(first, 1.0, equal=True))
        if self.near is None or not tokens.size:
            return None
        if (found := self.near_match(number, tokens, self.near)) is not None:
            self.near_matches[number] = found
        return found

    def near_match(self, number: int, tokens: NDArray[Any], near: Near) -> Match | None:
        """The most similar kept document at or over the threshold, the first of several."""
        mine = np.unique(shingles(tokens, near.ngram))
        signature = self.empty.copy()
        for start in range(
            0, len(mine), PIECE_SHINGLES
        ):  # datasketch holds permutations times as many numbers
            signature.update_batch((mine[start : start + PIECE_SHINGLES] >> np.uint64(32)).tolist())
        best = None
        for other in sorted(self.index.query(signature)):
            dataset, place = self.place(other)
            share = jaccard(mine, np.unique(shingles(dataset[place], near.ngram)))
            if share >= near.threshold and (best is None or share > best.jaccard):
                best = Match(other, share)
        if best is None:
            self.index.insert(number, signature)
        return best


def shingles(tokens: NDArray[Any], ngram: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each n-gram of a document, (n - ngram + 1,); of all of a shorter one, (1,).

    A polynomial in an odd number, and then the last steps of MurmurHash3, which spread it over all bits.
    """
    ids = tokens.astype(np.uint64)
    width = min(ngram, len(ids))
    found = np.full(len(ids) - width + 1, width, np.uint64)
    for i in range(width):
        found = (
            found * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - width + 1 + i] + np.uint64(1)
        )
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        found = (found ^ (found >> np.uint64(33))) * np.uint64(multiplier)
    return found ^ (found >> np.uint64(33))


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Share of two sorted sets that is in both."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def dedup(
    prefixes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    near: Near | None = None,
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Write the documents of token files without those that repeat an earlier one; returns the record.

    The first of equal documents stays, in the order of the inputs; with `near` a document also goes if a kept one
    overlaps with it by the threshold. Each sequence of a file counts as a document. `OUTPUT.dropped.jsonl` has a line
    for each that went: where it was, which kept one it repeats, and how much of it. The index of documents goes along.

    Time    one pass over the inputs; `near` reads each candidate once more.
    Raises  DataError if the inputs' dtypes or tokenizers differ; ConfigError if the output is an input.
    """
    datasets = [IndexedDataset(prefix) for prefix in several(prefixes)]
    if not datasets:
        raise ConfigError("nothing to look through: name at least one PREFIX")
    require_alike(datasets)
    prefix = without_suffix(output)
    refuse_inputs(prefix, datasets)
    facts, seen = tokenizer_facts(datasets), Seen(datasets, near)
    kept = [np.ones(len(dataset), np.bool_) for dataset in datasets]
    counts = {"equal": 0, "near": 0}
    with (
        IndexedDatasetWriter(prefix, datasets[0].dtype) as writer,
        atomic_write(prefix + REPORT) as report,
    ):
        for file, dataset in enumerate(datasets):
            for place in range(len(dataset)):
                match = seen.match(int(seen.starts[file]) + place)
                if match is None:
                    writer.add(dataset[place])
                else:
                    kept[file][place] = False
                    counts["equal" if match.equal else "near"] += 1
                    tell(report, seen, (dataset, place), match)
                if on_bytes:
                    on_bytes(int(dataset.sizes[place]) * dataset.dtype.itemsize)
        keep_indexes(prefix, datasets, kept)
        return finish(writer, prefix, {**facts, "dedup": dedup_facts(datasets, near, counts)})


def require_alike(datasets: Sequence[IndexedDataset]) -> None:
    """All inputs hold tokens of one dtype.

    Raises  DataError naming the one that differs.
    """
    for dataset in datasets:
        require_tokens(dataset)
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype}, but {datasets[0].prefix} holds {datasets[0].dtype};"
                " prepare both with the same tokenizer"
            )


def tell(report: IO[str], seen: Seen, dropped: tuple[IndexedDataset, int], match: Match) -> None:
    """A line of the report."""
    (dataset, place), (first, number) = dropped, seen.place(match.number)
    line = {
        "prefix": dataset.prefix,
        "document": place,
        "tokens": int(dataset.sizes[place]),
        "repeats": {"prefix": first.prefix, "document": number},
        "jaccard": match.jaccard,
        "equal": match.equal,
    }
    report.write(json.dumps(line, ensure_ascii=False) + "\n")


def dedup_facts(
    datasets: Sequence[IndexedDataset], near: Near | None, counts: dict[str, int]
) -> dict[str, Any]:
    """What went in and what went out, for the record."""
    inputs = [
        {"prefix": d.prefix, "documents": len(d), "tokens": int(d.sizes.sum(dtype="i8"))}
        for d in datasets
    ]
    return {"inputs": inputs, "near": None if near is None else vars(near), "dropped": counts}


def keep_indexes(
    prefix: str, datasets: Sequence[IndexedDataset], kept: Sequence[NDArray[np.bool_]]
) -> None:
    """The index of the documents that stay, if every input has one; an older one of the output goes."""
    paths, target = [Path(dataset.prefix + SUFFIX) for dataset in datasets], Path(prefix + SUFFIX)
    if not all(path.exists() for path in paths):
        target.unlink(missing_ok=True)
        return
    pyarrow, parquet = arrow()
    try:
        columns = dict.fromkeys(
            name for path in paths for name in parquet.read_schema(path).names if name not in OWN
        )
        tables = (
            table
            for path, mask in zip(paths, kept, strict=True)
            for table in kept_groups(path, mask)
        )
        with atomic_write(target, "wb") as file:
            write_index(file, (plain(pyarrow, table, [*columns]) for table in tables), [*columns])
    except (pyarrow.ArrowException, KeyError) as error:
        raise DataError(
            f"{', '.join(map(str, paths))}: an index of documents cannot be read: {error}"
        ) from None


def kept_groups(path: Path, kept: NDArray[np.bool_]) -> Iterator[Any]:
    """The rows of an index that stay, a row group at a time."""
    pyarrow, parquet = arrow()
    with parquet.ParquetFile(path) as index:
        if index.metadata.num_rows != len(kept):
            raise DataError(
                f"{path}: {index.metadata.num_rows} rows for {len(kept)} documents; remove it"
            )
        start = 0
        for group in range(index.num_row_groups):
            table = index.read_row_group(group)
            yield table.filter(pyarrow.array(kept[start : start + table.num_rows]))
            start += table.num_rows


def read_report(prefix: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of what was dropped from OUTPUT."""
    with open(without_suffix(prefix) + REPORT, encoding="utf-8") as file:
        yield from map(json.loads, file)
