"""The rows of a run as one sequence: several sources, blended by weight."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.data.blending import blend_maps
from castalia.data.fim import FillInTheMiddle
from castalia.data.labels import Labels
from castalia.data.order_cache import IndexMaps, OrderCache
from castalia.data.row_changes import RowChange, ServedRow
from castalia.data.row_source import DocumentSpan, RowPlaces, RowSource
from castalia.data.sources import Files


class ServedRows(ABC):
    """Rows of one or several sources, found by their place in the order in which a run serves them.

    `rows[p]` is (row (seq_length + 1,) int64, source, p), where `source` counts in `row_sources`.
    `labels` are the sources' label files; None makes every token a target. `label_weights` are
    their files of weights; None makes every target count 1. `reference` are files of
    log-probabilities under a reference model, None without; `rewards` a number for each document,
    None without. `fim` transforms rows as they are served, None without; so does `changes`, which
    also says which tokens are no targets, and which runs without interventions lack. Of pairs the
    rows are those of the preferred answers, and `rejected` serves the rejected one of each place;
    None for texts.
    """

    def __init__(self, row_sources: Sequence[RowSource[Any]]) -> None:
        self.row_sources = list(row_sources)
        self.files: Files | None = None
        self.labels: Labels = None
        self.label_weights: Labels = None
        self.fim: FillInTheMiddle | None = None
        self.changes: RowChange | None = None
        self.reference: Labels = None
        self.rewards: Sequence[NDArray[np.float32]] | None = None
        self.rejected: ServedRows | None = None

    def __repr__(self) -> str:
        sources = ", ".join(map(repr, self.row_sources))
        return f"{type(self).__name__}({sources})"

    @property
    def sides(self) -> list["ServedRows"]:
        """Itself, and of pairs the rejected answers."""
        return [self] if self.rejected is None else [self, self.rejected]

    def attach(self, files: Files) -> None:
        """Take labels and references of the sources, and of pairs the rejected answers."""
        self.files = files
        self.labels = files.labels
        self.label_weights = files.label_weights
        self.reference = files.reference
        self.rewards = files.rewards
        if files.rejected is not None:
            sources = zip(files.rejected.tokens, self.row_sources, strict=True)
            self.rejected = OtherSide([source.other(tokens) for tokens, source in sources])
            self.rejected.attach(files.rejected)

    @abstractmethod
    def locate(self, index: int) -> tuple[int, int]:
        """Source of the row served at place `index` >= 0, and the row's place in its order."""

    def locate_all(self, places: Sequence[int]) -> RowPlaces:
        """What `locate` gives for each of (n,) places."""
        pairs = np.array([self.locate(place) for place in places], np.int64).reshape(-1, 2)
        return RowPlaces(pairs[:, 0], pairs[:, 1])

    def origin(self, index: int) -> int:
        """The first place at which the row at place `index` is served for the same answers."""
        return index

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int, int]:
        source, spans = self.documents_of(index)
        return self.row(source, spans, int(index)), source, int(index)

    def row(self, source: int, spans: Sequence[DocumentSpan], index: int) -> NDArray[np.int64]:
        """The row made of spans of a source, (seq_length + 1,), as it is served at place
        `index`."""
        return self.served(source, spans, index).tokens

    def served(self, source: int, spans: Sequence[DocumentSpan], index: int) -> ServedRow:
        """The same row with what its changes say about it."""
        return self.changed(ServedRow(self.row_sources[source].row(spans), spans), source, index)

    def changes_row(self, index: int) -> bool:
        """Whether the row at place `index` may be served otherwise than the files have it."""
        if self.changes is not None:
            return self.changes.reaches(index)
        return self.fim is not None

    def changed(self, row: ServedRow, source: int, index: int) -> ServedRow:
        """A row as the files have it, as it is served at place `index`."""
        if self.changes is not None:
            return self.changes(row, source, index)
        if self.fim is not None:
            return ServedRow(self.fim(row.tokens, row.spans, index), row.spans)
        return row

    def documents_of(self, index: int) -> tuple[int, list[DocumentSpan]]:
        """Source of the row served at place `index`, and the spans of its documents."""
        source, place = self.locate(index)
        return source, self.row_sources[source].documents_of(place)

    def with_rows(self) -> list[int]:
        """The numbers of the sources that have rows."""
        counts = [len(source.order.shuffle_idx) for source in self.row_sources]
        return [number for number, count in enumerate(counts) if count]

    @property
    def seq_length(self) -> int:
        """Tokens of a row that the model sees."""
        length: int = self.row_sources[0].order.seq_length
        return length


class OtherSide(ServedRows):
    """Rejected answers, found by the source and place of the preferred ones."""

    def locate(self, index: int) -> tuple[int, int]:
        """Never called: the preferred answer of a pair says where both are."""
        raise AssertionError(index)


class BlendedRows(ServedRows):
    """Rows of one or several sources in served order, without an end.

    With `weights` the sources that have rows are blended, and the blend is built for `places`
    places. Beyond its end a blend serves place p modulo its size, and a source serves place i
    modulo its rows less one, as in GPT-NeoX; a file of ready rows starts again after its last row.
    The size of a blend is `size`, by default the sum of its sources.
    """

    def __init__(
        self,
        row_sources: Sequence[RowSource[Any]],
        weights: list[float] | None = None,
        places: int = 0,
        size: int | None = None,
        cache: OrderCache | None = None,
    ) -> None:
        super().__init__(row_sources)
        self.blended = self.with_rows()
        self.size = len(self.row_sources[0].order.shuffle_idx)
        self.period: int | None = None
        self.turns: IndexMaps | None = None
        if weights is not None:
            self.period = size or sum(len(source) for source in self.row_sources) or places
            self.size = self.period
        if weights is not None and len(self.row_sources) > 1:
            # Left out before the blend, whose rule would draw a source of weight 0 as well.
            own_weights = [weights[number] for number in self.blended]
            self.turns = blend_maps(own_weights, min(self.size, places), cache)

    def __len__(self) -> int:
        return self.size

    def locate(self, index: int) -> tuple[int, int]:
        """Source of the row served at place `index` >= 0, and the row's place in its order.

        Raises  IndexError for a negative place, or one past the places that the blend was built
                for.
        """
        place = operator.index(index)
        if place < 0:
            raise IndexError(f"place {index} is negative; places count from 0")
        if self.period:
            place %= self.period
        if self.turns is None:
            return 0, self.row_sources[0].order.wrap(place)
        picks = self.turns["dataset_index"]
        if place >= len(picks):
            raise IndexError(f"place {index} is past the {len(picks)} places of the blend")
        source = self.blended[int(picks[place])]
        number = int(self.turns["sample_index"][place])
        return source, self.row_sources[source].order.wrap(number)

    def locate_all(self, places: Sequence[int]) -> RowPlaces:
        """What `locate` gives for each of (n,) places, in arrays.

        Raises  IndexError as `locate`.
        """
        chosen = np.asarray(places, np.int64)
        if not len(chosen) or chosen.min() < 0:
            return super().locate_all(places)
        if self.period:
            chosen = chosen % self.period
        if self.turns is None:
            source = np.zeros(len(chosen), np.int64)
            return RowPlaces(source, wrapped(self.row_sources[0], chosen))
        picks = self.turns["dataset_index"]
        if chosen.max() >= len(picks):
            return super().locate_all(places)  # which says what is wrong
        source = np.array(self.blended, np.int64)[picks[chosen]]
        numbers = self.turns["sample_index"][chosen]
        for number in np.unique(source).tolist():
            own = np.flatnonzero(source == number)
            numbers[own] = wrapped(self.row_sources[number], numbers[own])
        return RowPlaces(source, numbers)


def wrapped(source: RowSource[Any], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of a source's order that serves each of (n,) places >= 0."""
    outside = np.flatnonzero(places >= len(source.order.shuffle_idx))
    if len(outside):
        places = places.copy()
        places[outside] = [source.order.wrap(place) for place in places[outside].tolist()]
    return places


class RepeatedRows(ServedRows):
    """The rows of every step served in several steps in a row: step t has those that step
    t // times of `rows` would have."""

    def __init__(self, rows: ServedRows, batch_size: int, times: int) -> None:
        super().__init__(rows.row_sources)
        self.labels = rows.labels
        self.rows = rows
        self.batch_size = batch_size
        self.times = times

    def origin(self, index: int) -> int:
        """The place in `rows` of the row served at place `index`."""
        step, place = divmod(index, self.batch_size)
        return step // self.times * self.batch_size + place

    def locate(self, index: int) -> tuple[int, int]:
        """Source of the row served at place `index` >= 0, and the row's place in its order."""
        return self.rows.locate(self.origin(index))

    def locate_all(self, places: Sequence[int]) -> RowPlaces:
        """What `locate` gives for each of (n,) places."""
        return self.rows.locate_all([self.origin(place) for place in places])
