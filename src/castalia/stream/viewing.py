"""The rows that steps of a run read: as an array, as records with text and sources, as a hash."""

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
from castalia.data.batch_sizes import BatchSizes, sizes_of
from castalia.data.ready_rows import common_dtype
from castalia.data.row_blocks import read_block
from castalia.data.run_rows import RunRows
from castalia.data.served import ServedRows
from castalia.data.sidecar import require_tokenizer
from castalia.data.span_table import DocumentSpan, SpanTable
from castalia.stream.opening import ROWS_AT_ONCE
from castalia.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Steps:
    """A range of steps of a run, counted from 0: step s leads from checkpoint s to s + 1."""

    first: int
    stop: int
    """One past the last step."""
    batches: BatchSizes | int
    """Rows in each step; a number if it is the same in all."""

    @property
    def places(self) -> range:
        """The rows' places in the run's order."""
        sizes = sizes_of(self.batches)
        return range(sizes.first(self.first), sizes.first(self.stop))


def parse_steps(text: str, batches: BatchSizes | int, total: int) -> Steps:
    """Parse `A:B`, steps A to B - 1, or `A`, one step; A defaults to 0 and B to the run's end.

    Raises  ConfigError if the text is not a range of steps within the run's `total`.
    """
    first, colon, stop = text.partition(":")
    words = [word.strip() for word in (first, stop)]
    if not text.strip() or not all(word.isascii() and word.isdigit() for word in words if word):
        raise ConfigError(
            f"--steps {text!r}: expected A:B (steps A to B - 1, counted from 0) or A, such as 0:10"
        )
    begin = int(words[0] or 0)
    end = begin + 1
    if colon:
        end = int(words[1] or total)
    if colon and begin >= end and begin < total:
        raise ConfigError(
            f"--steps {text}: no step; the end is exclusive and comes after the beginning, as in"
            f" {begin}:{begin + 1}"
        )
    if not begin < end <= total:
        if colon:
            asked = f"steps {begin} to {end - 1}"
        else:
            asked = f"step {begin}"
        raise ConfigError(f"--steps {text}: {asked}, but the run has steps 0 to {total - 1}")
    return Steps(begin, end, sizes_of(batches))


def save_ids(rows: ServedRows, steps: Steps, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Write the token ids of the steps' rows as one .npy file, atomically, in the sources' dtype.

    The layout is that of Pythia's batch_viewer.py. Memory holds a block of rows at a time.

    Returns  the shape, (rows of the steps, seq_length + 1).
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
        # Block by block: a run's ids may not fit in memory.
        for begin in range(0, len(steps.places), ROWS_AT_ONCE):
            places = steps.places[begin : begin + ROWS_AT_ONCE]
            file.write(read_block(rows, places, dtype).tokens.tobytes())
    return shape


def records(rows: RunRows, steps: Steps, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    """One dict per row of the steps, as `record_of` makes it.

    Raises  ConfigError if a token file was made with another tokenizer.
    """
    require_own_tokenizer(rows, tokenizer)
    for place in steps.places:
        yield record_of(rows, place, sizes_of(steps.batches), tokenizer)


def require_own_tokenizer(rows: RunRows, tokenizer: Tokenizer | None) -> None:
    """Raises  ConfigError if a token file was made with another tokenizer."""
    if tokenizer is None:
        return
    for pack in rows.train.row_sources:
        require_tokenizer(pack.dataset.prefix, tokenizer)


def record_of(
    rows: RunRows,
    place: int,
    batches: BatchSizes,
    tokenizer: Tokenizer | None,
    length: int | None = None,
) -> dict[str, Any]:
    """The row at a place of the run's order; with a `length`, its first inputs alone, as a
    curriculum has them, and the target of the last one.

    Keys: step, row within the step, source, prefix, documents (the pieces of documents in the row),
    with a tokenizer also the text of row and pieces, and with an index of origins in the token file
    where each document came from. Each piece is decoded alone, so a character cut at its border
    shows as U+FFFD. A row that an intervention changed has `changed`. Of a pair it is the preferred
    answer, and `rejected` has the other one's prefix, documents and text.
    """
    source, own_place = rows.train.locate(place)
    step, row = batches.step_of(place)
    records = []
    for side in rows.train.sides:
        pieces = side.row_sources[source].documents_of(own_place)
        records.append(contents_of(side, source, pieces, place, tokenizer, length))
    record = {"step": step, "row": row, "source": rows.sources[source], **records[0]}
    if len(records) > 1:
        record["rejected"] = records[1]
    return record


def contents_of(
    side: ServedRows,
    source: int,
    pieces: list[DocumentSpan],
    place: int,
    tokenizer: Tokenizer | None,
    length: int | None,
) -> dict[str, Any]:
    """Prefix, documents and text of the row of a source served at `place`, made of `pieces`."""
    row = None
    shown = pieces
    if tokenizer is not None or side.changes_row(place):
        row = side.served(source, pieces, place)
        shown = list(row.spans)
    if length is not None and length < side.seq_length:
        shown = SpanTable.of_lists([shown]).cut(length + 1).row(0)
    record: dict[str, Any] = {
        "prefix": side.row_sources[source].dataset.prefix,
        "documents": [piece._asdict() for piece in shown],
    }
    if row is not None and row.origin is not None:
        record["changed"] = True
    for document in record["documents"]:
        origin = read_provenance(record["prefix"], document["document"])
        if origin is not None:
            document["from"] = origin
    if tokenizer is not None and row is not None:
        ids = row.tokens
        if length is not None:
            ids = row.tokens[: length + 1]
        record["text"] = tokenizer.decode(ids)
        ends = np.cumsum([piece.length for piece in shown])
        piece_ids = np.split(ids, ends[:-1])
        for document, own_ids in zip(record["documents"], piece_ids, strict=True):
            document["text"] = tokenizer.decode(own_ids)
    return record


def step_hash(rows: ServedRows, step: int, batches: BatchSizes | int) -> int:
    """`rows_hash` of a step, as training writes it to metrics.jsonl.

    It is the sum over the rows of the CRC-32 of a row's inputs as little-endian int64, which does
    not depend on how ranks share the rows.
    """
    places = sizes_of(batches).places(step)
    located = rows.locate_all(places)
    total = 0
    for side in rows.sides:
        block = read_block(side, places, "<i8", located)
        total += sum(zlib.crc32(row[:-1]) for row in block.tokens)
    return total
