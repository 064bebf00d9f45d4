"""Token files whose items are ready rows, in the order in which steps take them: read as a source, and written.

Pythia's preshuffled files are of this kind: item i, 2,049 tokens, is row i, and step s of a run with B rows a step
takes items [s·B, (s+1)·B).

Source  utils/batch_viewer.py:41-43 of EleutherAI/pythia; its README on the preshuffled data sets.
"""

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import (
    CODES,
    IndexedDataset,
    IndexedDatasetWriter,
    require_tokens,
    without_suffix,
)
from castalia.data.packed import PackedDataset, Span
from castalia.data.packing_order import PaddedRows
from castalia.data.shards import OnBytes
from castalia.data.sidecar import finish, refuse_inputs

ROWS_AT_A_TIME = 256


class FileOrder:
    """Rows as they lie in the file, from the first again after the last.

    `epochs` is how many passes hold `num_samples` rows; `tokens_per_epoch` counts the tokens of the file;
    `shuffle_idx` is `range`: nothing is shuffled.
    Raises  DataError if an item is not a row of `seq_length` + 1 tokens, or there is none.
    """

    def __init__(self, dataset: IndexedDataset, *, seq_length: int, num_samples: int) -> None:
        if not len(dataset):
            raise DataError("data.order `file` needs rows, but the file is empty")
        if len(odd := np.flatnonzero(dataset.sizes != seq_length + 1)):
            i = int(odd[0])
            raise DataError(
                f"data.order `file` with data.seq_length {seq_length} needs items of {seq_length + 1} tokens, but item"
                f" {i} has {dataset.sizes[i]}; set data.seq_length to the items' length less one, or data.order=neox"
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


class ReadyRows:
    """The rows of a file in its own order: `rows[i]` is item i, (seq_length + 1,) int64.

    Raises  IndexError beyond the end; DataError if the file holds floats.
    """

    def __init__(self, dataset: IndexedDataset, order: FileOrder) -> None:
        require_tokens(dataset)
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.row(self.documents_of(index))

    def row(self, pieces: Sequence[Span]) -> NDArray[np.int64]:
        """The item that is the one stretch."""
        (piece,) = pieces
        return self.dataset.get(*piece).astype(np.int64)

    def documents_of(self, index: int) -> list[Span]:
        """The item itself: what documents its tokens came from is not known any more."""
        return [Span(self.place(index), 0, self.order.seq_length + 1)]

    def place(self, index: int) -> int:
        """`index`, checked."""
        place = operator.index(index)
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.dataset.prefix}")
        return place


Pack = PackedDataset | ReadyRows | PaddedRows
"""One source under its order."""


def write_rows(
    rows: Any,
    first: int,
    stop: int,
    output: str | os.PathLike[str],
    facts: dict[str, Any],
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Write the rows served at places [first, stop) of a `BlendedRows` as items of a token file; returns its record.

    dtype is that of the sources, the widest of several. `facts` go into the record.
    Raises  ConfigError if the output is a source or the packing leaves rows unfilled; CastaliaError if it
            cannot be written.
    """
    if any(isinstance(pack, PaddedRows) for pack in rows.row_sources):
        raise ConfigError(
            "rows that end early cannot be written as ready ones: set data.packing=packed"
        )
    datasets = [pack.dataset for pack in rows.row_sources]
    prefix = without_suffix(output)
    refuse_inputs(prefix, datasets)
    with IndexedDatasetWriter(prefix, common_dtype(datasets)) as writer:
        for start in range(first, stop, ROWS_AT_A_TIME):
            found = np.concatenate(
                [rows[place][0] for place in range(start, min(stop, start + ROWS_AT_A_TIME))]
            )
            writer.add_many(
                found, np.full(len(found) // (rows.seq_length + 1), rows.seq_length + 1)
            )
            if on_bytes:
                on_bytes(len(found) * writer.dtype.itemsize)
        return finish(writer, prefix, facts)


def common_dtype(datasets: list[IndexedDataset]) -> np.dtype[Any]:
    """The dtype that holds the ids of all sources."""
    found = np.result_type(*(dataset.dtype for dataset in datasets)).newbyteorder("<")
    return found if found in CODES else np.dtype("<i8")
