"""The rows that steps of a run use: as an array, as records with text and sources, and by hash."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castalia.core.errors import ConfigError
from castalia.core.files import atomic_write
from castalia.corpus.provenance import read_provenance
from castalia.data.ready_rows import common_dtype
from castalia.data.rows_by_source import RowsBySource
from castalia.data.run_rows import BlendedRows, RunRows
from castalia.data.sidecar import require_tokenizer
from castalia.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Steps:
    """Steps first, …, stop - 1 of a run, from 0, of `batch_size` rows: step s leads from checkpoint step-s to s + 1."""

    first: int
    stop: int
    batch_size: int

    @property
    def places(self) -> range:
        """Their places in the served order: step s uses [s·B, (s+1)·B)."""
        return range(self.first * self.batch_size, self.stop * self.batch_size)


def parse_steps(text: str, batch_size: int, total: int) -> Steps:
    """`A:B` is steps A to B - 1, `A` is step A alone; a missing A is 0, a missing B the end of the run.

    Raises  ConfigError if that is no range of steps within the run's `total`.
    """
    first, colon, stop = text.partition(":")
    words = [word.strip() for word in (first, stop)]
    if not text.strip() or not all(word.isascii() and word.isdigit() for word in words if word):
        raise ConfigError(
            f"--steps {text!r}: expected A:B (steps from A to B - 1, counted from 0) or A, such as 0:10"
        )
    begin = int(words[0] or 0)
    end = int(words[1] or total) if colon else begin + 1
    if not begin < end <= total:
        raise ConfigError(
            f"--steps {text}: steps {begin} to {end - 1}, but the run has steps 0 to {total - 1}"
        )
    return Steps(begin, end, batch_size)


def save_ids(
    rows: BlendedRows | RowsBySource, steps: Steps, path: str | os.PathLike[str]
) -> tuple[int, int]:
    """Write the ids of the steps' rows as one .npy, whole or not at all, in the sources' dtype; returns its shape.

    Shapes  (steps · batch_size, seq_length + 1), as Pythia's batch_viewer.py saves them; memory holds one row.
    """
    dtype = common_dtype([pack.dataset for pack in rows.row_sources])
    shape = (len(steps.places), rows.seq_length + 1)
    with atomic_write(Path(path), "wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for place in steps.places:
            file.write(rows[place][0].astype(dtype).tobytes())
    return shape


def records(rows: RunRows, steps: Steps, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    """One dict a row: step, row within the step, source and prefix, the documents' stretches, text if there is a
    tokenizer, and where each document came from if the token file has an index of them.

    A stretch's text is decoded by itself, so that a character cut by its border shows as U+FFFD.
    Raises  ConfigError if a token file was made with another tokenizer."""
    if tokenizer is not None:
        for pack in rows.train.row_sources:
            require_tokenizer(pack.dataset.prefix, tokenizer)
    for place in steps.places:
        source, pieces = rows.train.documents_of(place)
        record: dict[str, Any] = {
            "step": place // steps.batch_size,
            "row": place % steps.batch_size,
            "source": rows.sources[source],
            "prefix": rows.train.row_sources[source].dataset.prefix,
            "documents": [piece._asdict() for piece in pieces],
        }
        for found in record["documents"]:
            if (origin := read_provenance(record["prefix"], found["document"])) is not None:
                found["from"] = origin
        if tokenizer is not None:
            ids = rows.train[place][0]
            record["text"] = tokenizer.decode(ids)
            ends = np.cumsum([piece.length for piece in pieces])
            parts = np.split(ids, ends[:-1])
            for found, part in zip(record["documents"], parts, strict=True):
                found["text"] = tokenizer.decode(part)
        yield record


def step_hash(rows: BlendedRows | RowsBySource, step: int, batch_size: int) -> int:
    """`rows_hash` of a step as training writes it to metrics.jsonl: sum of the CRC-32 of each row's inputs as int64."""
    places = Steps(step, step + 1, batch_size).places
    return sum(zlib.crc32(rows[place][0][:-1].astype("<i8").tobytes()) for place in places)
