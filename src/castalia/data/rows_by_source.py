"""Rows by source, for runs whose mixer plans each step: which rows, of which source."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from castalia.core.errors import DataError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset
from castalia.data.order import select
from castalia.data.packings import cut_into_rows
from castalia.data.ready_rows import ready_rows
from castalia.data.row_source import DocumentSpan, RowPlaces, RowSource
from castalia.data.served import ServedRows
from castalia.data.sources import Files


class EmptyOrder:
    """The order of a source without a row: it is left out, or too short.

    `epochs` is 0 for a source left out. It is 1 for one that is too short: so it stands in the
    fingerprints of runs with mixing.allow_empty.
    """

    shuffle_idx = range(0)

    def __init__(self, seq_length: int, tokens: int, *, epochs: int) -> None:
        self.seq_length = seq_length
        self.tokens_per_epoch = tokens
        self.epochs = epochs

    def __len__(self) -> int:
        return 0

    def wrap(self, index: int) -> int:
        """Every place stays outside: no row can be read."""
        return index


class EmptyRows(RowSource[EmptyOrder]):
    """A source without a row. Reading one raises IndexError."""

    scattered = False

    def spans(self, row: int) -> list[DocumentSpan]:
        """Never called: no place has a row."""
        raise AssertionError(row)


def no_rows(dataset: IndexedDataset, config: DataConfig) -> EmptyRows:
    """A source that the run leaves out. It keeps its number, its name and its fingerprint."""
    tokens = int(dataset.sizes.sum(dtype=np.int64))
    return EmptyRows(dataset, EmptyOrder(config.seq_length, tokens, epochs=0))


@runtime_checkable
class ManyPlaces(Protocol):
    """An order that finds many places at once."""

    def locate_all(self, places: Sequence[int]) -> RowPlaces:
        """The source and row of each place."""


class RowsBySource(ServedRows):
    """Rows of several sources, each in one pass of its own order; each step's plan chooses some.

    `sizes` (K,) int64 are the rows per source: row i of source k is `row_sources[k][i]`, 0 <= i <
    sizes[k]. `order` gives the source and place of the row served at a place, from the record of a
    finished run; without it rows are found by source only.
    """

    def __init__(
        self,
        row_sources: Sequence[RowSource[Any]],
        order: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(row_sources)
        self.order = order
        rows = [len(source.order.shuffle_idx) for source in self.row_sources]
        self.sizes = np.array(rows, np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """Source of the row served at place `index`, and the row's place in its order.

        Raises  DataError without the record of a run.
        """
        if self.order is None:
            raise DataError(
                "the rows of a mixed run depend on its losses; read them from a run folder, whose"
                " mixture.jsonl records them"
            )
        return self.order(index)

    def locate_all(self, places: Sequence[int]) -> RowPlaces:
        """What `locate` gives for each of (n,) places; fast for ascending ones."""
        if isinstance(self.order, ManyPlaces):
            return self.order.locate_all(places)
        return super().locate_all(places)


def rows_by_source(
    files: Files,
    config: DataConfig,
    seed: int,
    documents: range | None = None,
    allow_empty: bool = False,
) -> RowsBySource:
    """One pass over each source: documents cut into rows as in GPT-NeoX, or ready rows as they are.

    A source whose weight in data.weights is 0 has no rows.

    documents    the documents of a single source to use; all by default.
    allow_empty  a source too short for a row has no rows; otherwise it is an error.
    Raises       DataError naming the source.
    """
    row_sources: list[RowSource[Any]] = []
    for number, dataset in enumerate(files.tokens):
        if config.weights is not None and config.weights[number] == 0:
            row_sources.append(no_rows(dataset, config))
            continue
        row_sources.append(one_pass(files.of(number), config, seed, documents, allow_empty))
    return RowsBySource(row_sources)


def one_pass(
    files: Files, config: DataConfig, seed: int, documents: range | None, allow_empty: bool
) -> RowSource[Any]:
    """One source, each of its rows once.

    Raises  DataError naming the source, if it is too short for a row.
    """
    dataset = files.tokens[0]
    tokens = int(select(dataset.sizes, documents)[0].sum(dtype=np.int64))
    if config.packing == "packed":
        too_short = tokens <= config.seq_length
    else:
        # Other packings pad, so any document makes a row. They report unusable documents
        # themselves.
        too_short = not len(dataset) and allow_empty
    if too_short and allow_empty:
        return EmptyRows(dataset, EmptyOrder(config.seq_length, tokens, epochs=1))
    if config.order == "file":
        return ready_rows(dataset, seq_length=config.seq_length, rows=0)
    if too_short:
        raise DataError(
            f"{dataset.prefix}: a row needs {config.seq_length + 1} tokens, but this source holds"
            f" {tokens} in all; remove it, give it weight 0 in data.weights or with"
            " mixing.allow_empty=true, or use a shorter data.seq_length"
        )
    return cut_into_rows(files, config, rows=0, seed=seed, documents=documents)
