"""How often the data repeat the document that a row is from: the dose of a memorized passage."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.corpus.provenance import SUFFIX
from castalia.memorization.analyses.files import EXTRA, PURPOSE, ScanFile
from castalia.memorization.analyses.intervals import binomial_interval
from castalia.memorization.analyses.joint import Counts
from castalia.stream.opening import Stream
from castalia.stream.same_data import training_hash

DOSES = 33
"""Dose 0 is unknown, dose d is 2^(d-1) to 2^d - 1 copies."""
UNKNOWN = 0


class Doses:
    """Copies of the document in which the scanned tokens of a row lie, by place.

    Copies are documents of equal text in the row's source, by their hashes in its document index.
    The dose of a row is unknown where its source has no index, or the tokens are from several
    documents.
    """

    def __init__(self, stream: Stream, window: int) -> None:
        """Read the document indexes.

        window  tokens of a row that were scanned: prompt and continuation.
        Raises  DataError if no source has an index.
        """
        self.served = stream.rows.train
        self.window = window
        prefixes = [source.dataset.prefix for source in self.served.row_sources]
        self.copies = [copies_of(prefix) for prefix in prefixes]
        if all(copies is None for copies in self.copies):
            raise DataError(
                f"no file {prefixes[0]}{SUFFIX}, nor for another source, so how often a document"
                " is repeated is unknown; omit --stream, or prepare the data with --documents"
            )

    def at(self, first: int, count: int) -> NDArray[np.int64]:
        """The doses of the rows at consecutive places, (count,)."""
        located = self.served.locate_all(range(first, first + count))
        doses = np.full(count, UNKNOWN)
        for number in np.unique(located.source).tolist():
            copies = self.copies[number]
            if copies is None:
                continue
            own = np.flatnonzero(located.source == number)
            table = self.served.row_sources[number].table(located.place[own])
            table = table.without_empty()
            begins = table.bounds[:-1]
            has_any = begins < table.bounds[1:]
            own = own[has_any]
            begins = begins[has_any]
            whole = table.lengths[begins] >= self.window
            found = copies[table.documents[begins[whole]]]
            doses[own[whole]] = 1 + np.log2(found).astype(np.int64)
        return doses


def copies_of(prefix: str) -> NDArray[np.int64] | None:
    """For each document of a token file the documents of the same text; None without an index.

    Raises  DataError if the index is damaged.
    """
    path = Path(prefix + SUFFIX)
    if not path.exists():
        return None
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    try:
        hashes: Any = parquet.read_table(path, columns=["hash"])["hash"].combine_chunks()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    width = hashes.type.byte_width
    texts = np.frombuffer(hashes.buffers()[1], np.uint8, width * len(hashes), hashes.offset * width)
    # The first 8 bytes: among a hundred million documents two differ in none of them by chance
    # once in two thousand corpora.
    keys = np.ascontiguousarray(texts.reshape(-1, width)[:, :8]).view(np.uint64).ravel()
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse], np.int64)


def require_same_stream(stream: Stream, file: ScanFile) -> None:
    """Raises  DataError if a scan is about rows of another stream."""
    own = training_hash(stream.rows.fingerprint)
    if file.fingerprint and file.fingerprint != own:
        raise DataError(
            f"{file.path} is a scan of other rows than those of --stream {stream.config.output}"
            f" (fingerprints {file.fingerprint} and {own}); name a run that was scanned"
        )


def dose_lines(counts: Counts) -> list[dict[str, Any]]:
    """A line for each dose: rows, share memorized, mean score.

    Shapes  counts (DOSES, L) rows by dose and score.
    """
    lines = []
    scores = np.arange(counts.shape[1]) / (counts.shape[1] - 1)
    for dose in range(1, DOSES):
        rows = int(counts[dose].sum())
        if not rows:
            continue
        hits = int(counts[dose, -1])
        low, high = binomial_interval(hits, rows) or (None, None)
        lines.append(
            {
                "copies": 1 << (dose - 1),
                "copies_to": (1 << dose) - 1,
                "rows": rows,
                "memorized": hits,
                "share": hits / rows,
                "share_low": low,
                "share_high": high,
                "mean_score": float(counts[dose] @ scores) / rows,
            }
        )
    return lines
