"""Rows by source, for a run whose plan says, step by step, which rows of which source are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.order import NeoxOrder, chosen
from castalia.data.order_cache import cache_of
from castalia.data.packed import PackedDataset, Span
from castalia.data.packing_order import PaddedRows, piece_rows
from castalia.data.ready_rows import FileOrder, ReadyRows


class RowPlaces(NamedTuple):
    """Rows to read: source (n,), the place in `packs`, and place (n,), the place in that source's order; int64."""

    source: NDArray[np.int64]
    place: NDArray[np.int64]


class EmptyOrder:
    """The order of a source that holds no whole row."""

    epochs = 1
    shuffle_idx = range(0)

    def __init__(self, seq_length: int, tokens: int) -> None:
        self.seq_length, self.tokens_per_epoch = seq_length, tokens


@dataclass(frozen=True)
class EmptySource:
    """A source that holds no whole row: nothing can be read of it."""

    dataset: IndexedDataset
    order: EmptyOrder

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        raise IndexError(f"row {index} of 0 in {self.dataset.prefix}")

    def documents_of(self, index: int) -> list[Span]:
        """None of them can be asked for."""
        raise IndexError(f"row {index} of 0 in {self.dataset.prefix}")


SourcePack = PackedDataset | ReadyRows | PaddedRows | EmptySource
"""One pass over a source."""


class RowsBySource:
    """Rows of several sources, each in one pass of its own order; a plan says which of them a step takes.

    `sizes` (K,) int64 are rows a source: row i of source k is `packs[k][i]`, 0 <= i < sizes[k]. `locate` finds the
    row of a place of the served order where `order` was given, from the record of a run.
    """

    def __init__(
        self, packs: Sequence[SourcePack], order: Callable[[int], tuple[int, int]] | None = None
    ) -> None:
        self.row_sources, self.order = list(packs), order
        self.labels: list[IndexedDataset] | None = None
        self.sizes = np.array([len(pack.order.shuffle_idx) for pack in packs], np.int64)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int, int]:
        source, place = self.locate(index)
        return self.row_sources[source][place], source, int(index)

    def locate(self, index: int) -> tuple[int, int]:
        """The source of the row served at place `index`, and its place in that source's order.

        Raises  DataError without a plan.
        """
        if self.order is None:
            raise DataError(
                "the rows of a mixed run follow its losses: only its mixture.jsonl tells which they were"
            )
        return self.order(index)

    def documents_of(self, index: int) -> tuple[int, list[Span]]:
        """The source of the row served at place `index`, and the stretches of its documents in the row."""
        source, place = self.locate(index)
        return source, self.row_sources[source].documents_of(place)

    @property
    def seq_length(self) -> int:
        """Tokens in a row that the model sees."""
        return self.row_sources[0].order.seq_length


def rows_by_source(
    datasets: Sequence[IndexedDataset],
    config: DataConfig,
    seed: int,
    documents: range | None = None,
    labels: list[IndexedDataset] | None = None,
    *,
    allow_empty: bool = False,
) -> RowsBySource:
    """One pass over each source: its documents shuffled and cut into rows as GPT-NeoX does, or ready rows as they lie.

    documents    the documents of a single source to use; all by default.
    labels       a label file for each source.
    allow_empty  a source too short for a row has no rows; otherwise it is an error.
    Raises       DataError naming the source.
    """
    packs = [
        one_pass(dataset, config, seed, documents, labels[i] if labels else None, allow_empty)
        for i, dataset in enumerate(datasets)
    ]
    return RowsBySource(packs)


def one_pass(
    dataset: IndexedDataset,
    config: DataConfig,
    seed: int,
    documents: range | None,
    labels: IndexedDataset | None,
    allow_empty: bool,
) -> SourcePack:
    """One source, each of its rows once."""
    require_tokens(dataset)
    cache = cache_of(dataset.prefix, config.order_cache)
    if config.packing != "packed" and (len(dataset) or not allow_empty):
        return piece_rows(dataset, config, 0, seed, documents, labels, cache)
    tokens = int(chosen(dataset.sizes, documents)[0].sum(dtype=np.int64))
    if tokens <= config.seq_length and allow_empty:
        return EmptySource(dataset, EmptyOrder(config.seq_length, tokens))
    try:
        if config.order == "file":
            return ReadyRows(
                dataset, FileOrder(dataset, seq_length=config.seq_length, num_samples=0)
            )
        if tokens <= config.seq_length:
            raise DataError(
                f"a row needs {config.seq_length + 1} tokens, but this source holds {tokens} in all; take it out, set"
                " mixing.allow_empty=true to give it weight 0, or take a shorter data.seq_length"
            )
        numbers = {"seq_length": config.seq_length, "num_samples": 0, "seed": seed}
        order = NeoxOrder(dataset.sizes, **numbers, documents=documents, cache=cache)
    except DataError as error:
        raise DataError(f"{dataset.prefix}: {error}") from None
    return PackedDataset(dataset, order)
