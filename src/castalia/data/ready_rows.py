"""Token files whose items are ready rows, in the order in which steps take them: reading and
writing.

Pythia's preshuffled files are of this kind. Item i, of 2,049 tokens, is row i; step s of a run with
B rows per step takes items [s·B, (s+1)·B).

Source  utils/batch_viewer.py:41-43 of EleutherAI/pythia; its README on the preshuffled data sets.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import CODES, IndexedDataset, IndexedDatasetWriter, without_suffix
from castalia.data.row_source import DocumentSpan, RowSource
from castalia.data.served import ServedRows
from castalia.data.shards import OnBytes
from castalia.data.sidecar import close_with_record, refuse_inputs, refuse_to_replace
from castalia.data.span_table import SpanTable

ROWS_AT_A_TIME = 256
"""Rows written in one call: enough to hide the call, few enough to hold in memory."""


class FileOrder:
    """Rows in the order of the file, from the first again after the last.

    `epochs` is the number of passes that hold `num_samples` rows; `tokens_per_epoch` counts the
    tokens of the file; `shuffle_idx` is a range, because nothing is shuffled.
    Raises  DataError if the file is empty, or an item is not a row of `seq_length` + 1 tokens.
    """

    def __init__(self, dataset: IndexedDataset, *, seq_length: int, num_samples: int) -> None:
        if not len(dataset):
            raise DataError("data.order `file` needs rows, but the file is empty")
        wrong = np.flatnonzero(dataset.sizes != seq_length + 1)
        if len(wrong):
            item = int(wrong[0])
            raise DataError(
                f"data.order `file` with data.seq_length {seq_length} needs items of"
                f" {seq_length + 1} tokens, but item {item} has {dataset.sizes[item]}; set"
                " data.seq_length to the items' length less one, or data.order=neox"
            )
        self.seq_length = seq_length
        self.shuffle_idx = range(len(dataset))
        self.epochs = max(1, -(-num_samples // len(dataset)))
        self.tokens_per_epoch = len(dataset) * (seq_length + 1)

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def wrap(self, index: int) -> int:
        """The item served at any place >= 0."""
        return index % len(self)


class ReadyRows(RowSource[FileOrder]):
    """The items of a file, each a row. The documents that its tokens came from are unknown."""

    # Steps read the file from front to back, where the kernel's read-ahead is right.
    scattered = False

    def spans(self, row: int) -> list[DocumentSpan]:
        """The whole item."""
        return [DocumentSpan(row, 0, self.order.seq_length + 1)]

    def spans_of(self, rows: NDArray[np.int64]) -> SpanTable:
        """What `spans` gives for each of (n,) rows."""
        whole = np.full(len(rows), self.order.seq_length + 1)
        return SpanTable(np.arange(len(rows) + 1), rows, np.zeros_like(rows), whole)


def ready_rows(dataset: IndexedDataset, *, seq_length: int, rows: int) -> ReadyRows:
    """A file of ready rows as a source, for an order of `rows` rows.

    Raises  DataError naming the file, if its items are not rows of this length.
    """
    try:
        order = FileOrder(dataset, seq_length=seq_length, num_samples=rows)
    except DataError as error:
        raise DataError(f"{dataset.prefix}: {error}") from None
    return ReadyRows(dataset, order)


def write_rows(
    rows: ServedRows,
    first: int,
    stop: int,
    output: str | os.PathLike[str],
    facts: dict[str, Any],
    on_bytes: OnBytes | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the rows served at places [first, stop) as items of a token file; returns its record.

    The dtype is the widest of the sources'. `facts` are added to the record.
    Raises  ConfigError if the output is one of the sources or holds token files of another job that
            are not to be overwritten, or rows may end early; CastaliaError if the file cannot be
            written.
    """
    if any(source.padded for source in rows.row_sources):
        raise ConfigError(
            "rows that end early cannot be written as ready rows, because the padding would become"
            " targets: set data.packing=packed"
        )
    datasets = [source.dataset for source in rows.row_sources]
    prefix = without_suffix(output)
    refuse_inputs(prefix, datasets)
    refuse_to_replace(prefix, facts, overwrite)
    length = rows.seq_length + 1
    with IndexedDatasetWriter(prefix, common_dtype(datasets)) as writer:
        for start in range(first, stop, ROWS_AT_A_TIME):
            places = range(start, min(stop, start + ROWS_AT_A_TIME))
            tokens = np.concatenate([row_to_write(rows, place) for place in places])
            writer.add_many(tokens, np.full(len(places), length))
            if on_bytes:
                on_bytes(len(tokens) * writer.dtype.itemsize)
        return close_with_record(writer, prefix, facts)


def row_to_write(rows: ServedRows, place: int) -> NDArray[np.int64]:
    """The row at a place, (n,).

    Raises  ConfigError if an intervention keeps some of its tokens from being targets.
    """
    row = rows.served(*rows.documents_of(place), place)
    if row.ignored is not None:
        raise ConfigError(
            "an intervention of these rows leaves tokens that are no targets, which ready rows"
            " cannot tell: write the steps before it, or without data.interventions"
        )
    return row.tokens


def common_dtype(datasets: Sequence[IndexedDataset]) -> np.dtype[Any]:
    """The dtype that holds the ids of all sources, and that a token file can have."""
    common = np.result_type(*(dataset.dtype for dataset in datasets)).newbyteorder("<")
    return common if common in CODES else np.dtype("<i8")
