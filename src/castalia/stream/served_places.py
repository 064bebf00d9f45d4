"""From a row of a source to the places at which a run serves it, and from a text's place in a
document to every step that reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.files import sha256_of
from castalia.data.order_cache import IndexMaps, cache_of, from_cache
from castalia.data.row_source import RowSource
from castalia.data.served import ServedRows
from castalia.runs.recorded_order import RecordedOrder
from castalia.stream.document_places import (
    Covers,
    Ints,
    covers,
    document_maps,
    group,
    members,
)
from castalia.stream.opening import Stream
from castalia.stream.same_data import training_hash

VERSION = 1
"""Version of the maps, part of their key. Raise it whenever they change."""
BLOCK = 1 << 20
"""Places looked up at a time."""


class Occurrences(NamedTuple):
    """Texts in rows, each array (n,), ascending by place and then by `at`."""

    place: Ints
    """Place of the row in the run's order."""
    at: Ints
    """Where the text begins in the row."""
    source: Ints
    document: Ints
    offset: Ints
    """Where it begins in the document."""
    epoch: Ints
    """How often this place of the document came before in the stream."""
    length: Ints
    """Tokens of the text."""

    @property
    def total(self) -> int:
        """Their number, n."""
        return len(self.place)

    def chosen(self, keep: NDArray[Any]) -> "Occurrences":
        """Those at a mask or at indexes."""
        return Occurrences(*(values[keep] for values in self))


def none_found() -> Occurrences:
    """No occurrences."""
    return Occurrences(*(np.empty(0, np.int64) for _ in Occurrences._fields))


def joined(parts: list[Occurrences]) -> Occurrences:
    """Several as one, in order."""
    if not parts:
        return none_found()
    found = Occurrences(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    return found.chosen(np.lexsort((found.length, found.at, found.place)))


class ServedPlaces:
    """Where the rows of a stream's steps up to `stop` are served.

    The maps are kept in the folder of the run's index maps, if they are large.
    """

    def __init__(self, stream: Stream, stop: int) -> None:
        self.stream = stream
        self.served = stream.rows.train
        self.sources = self.served.row_sources
        self.stop = stream.sizes.first(stop)
        prefix = self.sources[0].dataset.prefix
        cache = cache_of(prefix, stream.config.data.order_cache)
        rows = sum(len(source.order.shuffle_idx) for source in self.sources)
        documents = sum(len(source.dataset) for source in self.sources)

        def key() -> dict[str, Any]:
            facts = {"fingerprint": training_hash(stream.rows.fingerprint), "places": self.stop}
            facts |= {"updates": stream.config.updates_per_rows, "record": record_hash(stream)}
            return {"order": "trace", "version": VERSION, **facts}

        def build() -> IndexMaps:
            return all_maps(self.served, self.stop)

        # 8 bytes for a place and for the beginning of a row's places, and 16 for a document's.
        self.maps = from_cache(cache, 8 * (self.stop + rows) + 24 * documents, key, build)

    def of(self, source: int) -> IndexMaps:
        """The maps of one source."""
        mark = f"{source}."
        return {
            name.removeprefix(mark): values
            for name, values in self.maps.items()
            if name.startswith(mark)
        }

    def occurrences(
        self, source: int, documents: Ints, offsets: Ints, length: int
    ) -> tuple[Occurrences, Ints]:
        """Texts of `length` tokens by document and offset of a source, (m,), where rows hold them.

        Returns  the occurrences, and the places of rows whose border cuts one of the texts.
        """
        found, place = self.covers(source, documents, offsets, length)
        text = found.text
        columns = (
            place,
            found.at,
            np.full(len(text), source),
            documents[text],
            offsets[text],
            self.passes_before(found, place, text, place, found.at),
            np.full(len(text), length),
        )
        cut = place[~found.whole & ~found.again]
        return Occurrences(*columns).chosen(found.whole), cut

    def covers(
        self, source: int, documents: Ints, offsets: Ints, length: int
    ) -> tuple[Covers, Ints]:
        """The rows that hold the beginning of texts, once for each place at which they are served,
        and these places."""
        maps = self.of(source)
        found = covers(self.sources[source], maps, documents, offsets, length)
        which, item = members(maps["rows"], found.row)
        places = maps["places"][item].astype(np.int64)
        found = found.chosen(which)
        if self.stream.config.curriculum.kind == "none":
            return found, places
        # What a step leaves out of its rows never comes back.
        room = self.stream.lengths(places) + 1
        found = found._replace(whole=found.whole & (found.at + length <= room))
        read = found.at < room
        return found.chosen(read), places[read]

    def passes_before(self, found: Covers, places: Ints, text: Ints, place: Ints, at: Ints) -> Ints:
        """How many passes over a text's place in its document begin before a place in the stream.

        Shapes  text, place, at (n,) -> (n,); `found` are the rows of the texts, at `places`.
        """
        room = self.served.seq_length + 1
        counted = np.flatnonzero(~found.again)
        begins = places * room + found.at
        # Ranks in place of `begins`: of 30 million texts in a run of Pythia's, text times places
        # times room is beyond 64 bits.
        ordered = np.unique(begins[counted])
        base = len(ordered) + 1
        keys = np.sort(found.text[counted] * base + np.searchsorted(ordered, begins[counted]))
        before = text * base + np.searchsorted(ordered, place * room + at)
        return np.searchsorted(keys, before) - np.searchsorted(keys, text * base)

    def with_epochs(self, found: Occurrences) -> Occurrences:
        """Occurrences that were read in rows, with the passes before each."""
        epoch = np.zeros(found.total, np.int64)
        for source in np.unique(found.source).tolist():
            own = np.flatnonzero(found.source == source)
            # Interventions may have put in documents that the file does not have.
            own = own[found.document[own] >= 0]
            pairs = np.stack([found.document[own], found.offset[own]], axis=1)
            texts, text = np.unique(pairs, axis=0, return_inverse=True)
            text = text.reshape(-1)
            rows, places = self.covers(source, texts[:, 0], texts[:, 1], 1)
            epoch[own] = self.passes_before(rows, places, text, found.place[own], found.at[own])
        return found._replace(epoch=epoch)


def record_hash(stream: Stream) -> str | None:
    """SHA-256 of the record of a mixed run, from which its order follows."""
    order = getattr(stream.rows.train, "order", None)
    if not isinstance(order, RecordedOrder):
        return None
    return sha256_of(Path(stream.config.output) / "mixture.jsonl")


def all_maps(served: ServedRows, stop: int) -> dict[str, NDArray[Any]]:
    """The maps of every source: those of its documents, and where its rows are served.

    `rows` (R + 1,) is where the places of each of its R rows begin in `places`.
    """
    source, own_place = located(served, stop)
    maps: dict[str, NDArray[Any]] = {}
    for number, row_source in enumerate(served.row_sources):
        places = np.flatnonzero(source == number)
        rows = rows_at(row_source, own_place[places])
        count = len(row_source.order.shuffle_idx)
        # A split leaves rows out, but not their numbers.
        if count and not isinstance(row_source.order.shuffle_idx, range):
            count = max(count, int(row_source.order.shuffle_idx.max()) + 1)
        first, items = group(rows, count)
        maps[f"{number}.rows"] = first
        maps[f"{number}.places"] = places[items]
        # Of a source that no step reads nothing is asked.
        own: Mapping[str, NDArray[Any]] = {}
        if len(places):
            own = document_maps(row_source)
        maps |= {f"{number}.{name}": values for name, values in own.items()}
    return maps


def rows_at(source: RowSource[Any], own_places: Ints) -> Ints:
    """The row of a source at each place of its order."""
    served = source.order.shuffle_idx
    if isinstance(served, range):
        return own_places
    return np.asarray(served[own_places]).astype(np.int64)


def located(served: ServedRows, stop: int) -> tuple[NDArray[np.int32], Ints]:
    """The source of the row at each place before `stop`, and its place in the source's order."""
    source = np.empty(stop, np.int32)
    own_place = np.empty(stop, np.int64)
    for first in range(0, stop, BLOCK):
        places = range(first, min(first + BLOCK, stop))
        source[places.start : places.stop], own_place[places.start : places.stop] = (
            served.locate_all(places)
        )
    return source, own_place
