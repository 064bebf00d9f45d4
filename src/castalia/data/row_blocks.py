"""Many rows read at once: the same rows that steps read one by one, at the speed of memory."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.data.indexed import IndexedDataset
from castalia.data.mapped import MappedFile
from castalia.data.row_changes import ServedRow
from castalia.data.row_source import RowPlaces
from castalia.data.served import ServedRows
from castalia.data.span_table import DocumentSpan, SpanTable, joined, runs

SHORT = 64
"""Mean tokens of a span up to which an index of all tokens is faster than a copy for each span."""


@dataclass(frozen=True)
class RowBlock:
    """R rows of a run, as its steps read them."""

    tokens: NDArray[np.integer]
    """(R, T + 1) ids, padded with 0 where a row ends early."""
    source: NDArray[np.int32]
    """(R,) the number of each row's source."""
    table: SpanTable
    """The documents of each row, as arrays."""

    @cached_property
    def spans(self) -> list[list[DocumentSpan]]:
        """The documents of each row, in order."""
        return self.table.lists()


def read_block(
    served: ServedRows,
    places: range,
    dtype: DTypeLike = np.int64,
    located: RowPlaces | None = None,
) -> RowBlock:
    """The rows that are served at some places; of pairs the preferred answers, whose sources and
    places `located` find the rejected ones in `served.rejected`.

    Raises  as `ServedRows.locate`; DataError if a document lies beyond its file.
    """
    if located is None:
        located = served.locate_all(places)
    tokens = np.zeros((len(places), served.seq_length + 1), dtype)
    tables = []
    rows = []
    for number in np.unique(located.source).tolist():
        source = served.row_sources[number]
        own = np.flatnonzero(located.source == number)
        table = source.table(located.place[own])
        copy_rows(source.dataset, table, own, tokens)
        tables.append(table)
        rows.append(own)
    block = RowBlock(tokens, located.source.astype(np.int32), joined(tables, rows, len(places)))
    return changed(served, block, places)


def changed(served: ServedRows, block: RowBlock, places: range) -> RowBlock:
    """The rows of the files at some places, changed as they are served."""
    if served.changes is None and served.fim is None:
        return block
    chosen = [row for row, place in enumerate(places) if served.changes_row(place)]
    if not chosen:
        return block
    spans_of_rows = list(block.spans)
    for row in chosen:
        tokens = block.tokens[row].astype(np.int64)
        before = ServedRow(tokens, spans_of_rows[row])
        after = served.changed(before, int(block.source[row]), places[row])
        block.tokens[row] = after.tokens
        spans_of_rows[row] = list(after.spans)
    if spans_of_rows != block.spans:
        # The changes of a row may be longer or shorter than what was there.
        return RowBlock(block.tokens, block.source, SpanTable.of_lists(spans_of_rows))
    return block


def copy_rows(
    dataset: IndexedDataset,
    table: SpanTable,
    rows: NDArray[np.int64],
    tokens: NDArray[np.integer],
) -> None:
    """Copy the rows of a table from their file into rows `rows` of `tokens`.

    Raises  DataError if a document lies beyond the file; IndexError if a span does its document.
    """
    check_spans(dataset, table)
    width = dataset.dtype.itemsize
    begins = dataset.pointers[table.documents] + table.starts * width
    targets = rows[table.row_of_span] * tokens.shape[1] + table.offsets
    flat = tokens.reshape(-1)
    assert np.shares_memory(flat, tokens), tokens.strides
    buffer = dataset.buffer
    if not isinstance(buffer, MappedFile) or (begins % width).any():
        # Of shards a span may lie in two; a file of another program may stand at odd bytes.
        spans = zip(begins.tolist(), targets.tolist(), table.lengths.tolist(), strict=True)
        for begin, target, length in spans:
            flat[target : target + length] = buffer.view(dataset.dtype, length, begin)
        return
    whole = buffer.view(dataset.dtype, len(buffer) // width, 0)
    begins //= width
    if table.lengths.sum() <= SHORT * len(table.lengths):
        flat[runs(targets, table.lengths)] = whole[runs(begins, table.lengths)]
        return
    ends = begins + table.lengths
    stops = targets + table.lengths
    copies = zip(targets.tolist(), stops.tolist(), begins.tolist(), ends.tolist(), strict=True)
    for target, stop, begin, end in copies:
        flat[target:stop] = whole[begin:end]


def check_spans(dataset: IndexedDataset, table: SpanTable) -> None:
    """Check that spans lie within their documents, and these within the file.

    Raises  DataError, IndexError as `IndexedDataset.get`.
    """
    sizes = dataset.sizes[table.documents].astype(np.int64)
    begins = dataset.pointers[table.documents]
    wrong = (begins < 0) | (begins + sizes * dataset.dtype.itemsize > len(dataset.buffer))
    wrong |= (table.starts < 0) | (table.starts + table.lengths > sizes)
    columns = (table.documents, table.starts, table.lengths)
    for span in np.flatnonzero(wrong).tolist():
        dataset.get(*(int(column[span]) for column in columns))
