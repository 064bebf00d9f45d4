"""Texts in the rows that steps read, found by reading the rows."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.stream.document_places import Ints
from castalia.stream.opening import Block, Stream
from castalia.stream.processes import in_processes
from castalia.stream.served_places import Occurrences, joined
from castalia.stream.text_forms import Form

TASK_TOKENS = 1 << 23
"""Tokens that are read before progress is told, and the share of a worker."""
WORTH_TOKENS = 1 << 30
"""Fewer tokens are read in this process, in some 15 s: starting another takes seconds, too."""

OnTokens = Callable[[int], Any]


@dataclass(frozen=True)
class Borders:
    """Which texts may go on from one document of a row into the next."""

    end: int | None
    """The id that ends documents: a text may that holds it before its last token."""
    changed: Sequence[range] = ()
    """Places of rows that are changed as they are served: what was put into one may be any text."""

    def cross(self, ids: Sequence[int], places: range) -> NDArray[np.bool_]:
        """For each row at some places, whether `ids` may."""
        if self.end in ids[:-1]:
            return np.ones(len(places), bool)
        return ~outside(np.arange(places.start, places.stop), self.changed)


def outside(places: Ints, ranges: Sequence[range]) -> NDArray[np.bool_]:
    """Which of (n,) places are in none of the ranges."""
    keep = np.ones(len(places), bool)
    for one in ranges:
        keep &= (places < one.start) | (places >= one.stop)
    return keep


def scan(
    stream: Stream,
    places: range,
    forms: Sequence[Form],
    borders: Borders,
    *,
    workers: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Occurrences:
    """The texts in the rows served at some places; epochs are 0."""
    room = stream.rows.train.seq_length + 1
    size = max(1, TASK_TOKENS // room)
    tasks = [
        range(first, min(first + size, places.stop))
        for first in range(places.start, places.stop, size)
    ]
    tell = on_tokens or (lambda tokens: None)
    processes = min(workers or os.cpu_count() or 1, len(tasks))
    if processes == 1 or len(places) * room < WORTH_TOKENS:
        processes = 0  # this one
    found: list[Occurrences] = []
    results = in_processes(stream, partial(scan_rows, forms, borders), tasks, processes)
    for task, occurrences in zip(tasks, results, strict=True):
        found.append(occurrences)
        tell(len(task) * room)
    return joined(found)


def scan_rows(
    forms: Sequence[Form], borders: Borders, stream: Stream, places: range
) -> Occurrences:
    """The texts in the rows at some places."""
    return joined(
        [
            occurrences
            for block in stream.blocks_read(places, dtype=np.int32)
            for occurrences in in_block(block, forms, borders)
        ]
    )


def in_block(block: Block, forms: Sequence[Form], borders: Borders) -> Iterator[Occurrences]:
    """The texts in a block of rows."""
    table = block.table
    offsets = table.offsets
    room = block.tokens.shape[1]
    row_of_span = table.row_of_span
    if not len(row_of_span):
        return
    # Pieces ascend by row and offset: one search finds that of each place.
    keys = row_of_span * room + offsets
    filled = block.filled
    for form in forms:
        row, at = places_of(block.tokens, form.ids)
        span = np.searchsorted(keys, row * room + at, side="right") - 1
        last = offsets[span] + table.lengths[span]
        crosses = borders.cross(form.ids, block.places)[row]
        last = np.where(crosses & (at < last), filled[row], last)
        # A row may have no document at all.
        inside = np.flatnonzero((at + len(form.ids) <= last) & (row_of_span[span] == row))
        columns = (
            row + block.places.start,
            at,
            block.source[row].astype(np.int64),
            table.documents[span],
            table.starts[span] + at - offsets[span],
            np.zeros_like(row),
            np.full(len(row), len(form.ids)),
        )
        yield Occurrences(*columns).chosen(inside)


def places_of(tokens: NDArray[np.integer], ids: Sequence[int]) -> tuple[Ints, Ints]:
    """Rows and columns at which `ids` (n,) begin in `tokens` (R, C)."""
    columns = tokens.shape[1] - len(ids) + 1
    if columns < 1:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # One pass over all tokens; the other ids are compared where the first one stands.
    row, at = np.nonzero(tokens[:, :columns] == ids[0])
    for place, token in enumerate(ids[1:], 1):
        same = tokens[row, at + place] == token
        row = row[same]
        at = at[same]
    return row, at
