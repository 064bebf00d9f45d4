"""Counts, places and continuations of token sequences in a token file: from its index, or by
reading it."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.fingerprint import contents
from castalia.data.indexed import IndexedDataset
from castalia.stream.index.building import (
    index_folder,
    missing_parts,
    read_manifest,
    require_same_data,
)
from castalia.stream.index.flat import FlatTokens, Positions, sortable
from castalia.stream.index.parts import Part, is_intact, part_path

AT_ONCE = 1 << 20
"""Continuations read at a time."""
READ_TOKENS = 1 << 22
"""Tokens that a thread reads at a time."""
SAMPLE_TOKENS = 1 << 18
"""Tokens by which the rarest id of a text is chosen: a pass over them for each of its ids."""


class Search(ABC):
    """Token sequences in a token file. A sequence is found where it stands within one document."""

    flat: FlatTokens

    def __len__(self) -> int:
        """Tokens of the file."""
        return len(self.flat)

    @abstractmethod
    def find(self, ids: Sequence[int]) -> Positions:
        """The positions in the file at which `ids` begin, ascending."""

    def count(self, ids: Sequence[int]) -> int:
        """How often `ids` stand in the file."""
        return len(self.find(ids))

    def following(self, ids: Sequence[int]) -> Counter[int]:
        """How often each id follows `ids` within a document; without ids, how often each stands.

        Source  the infini-gram query `ntd`, Liu et al. 2024, arXiv:2401.17377.
        """
        counts: Counter[int] = Counter()
        for next_ids in self.continuations(ids):
            tokens, numbers = np.unique(next_ids, return_counts=True)
            counts.update(dict(zip(tokens.tolist(), numbers.tolist(), strict=True)))
        return counts

    def continuations(self, ids: Sequence[int]) -> Iterator[NDArray[Any]]:
        """The ids that follow `ids` in the file, in blocks."""
        if not ids:
            for first in range(0, len(self), READ_TOKENS):
                yield self.flat.read(first, first + READ_TOKENS)
            return
        positions = self.find(ids)
        for first in range(0, len(positions), AT_ONCE):
            block = self.flat.within_a_document(positions[first : first + AT_ONCE], len(ids) + 1)
            yield self.flat.gather(block + len(ids))

    def longest_suffix(self, ids: Sequence[int]) -> list[int]:
        """The longest end of `ids` that stands in the file, by which ∞-grams back off.

        Source  Liu et al. 2024, arXiv:2401.17377, section 2.
        """
        # If an end occurs, so does every shorter one: halving finds the longest.
        least = 0
        most = len(ids)
        while least < most:
            length = (least + most + 1) // 2
            if self.count(ids[len(ids) - length :]):
                least = length
            else:
                most = length - 1
        return list(ids[len(ids) - least :])


class Index(Search):
    """The index of a token file, memory-mapped: opening it reads no part.

    `known` are the token file's sizes and hashes, where they have been computed already, as in a
    run's fingerprint.

    Raises  DataError if there is no index, it is not finished, or it is of other data.
    """

    def __init__(
        self,
        dataset: IndexedDataset | str | os.PathLike[str],
        folder: str | os.PathLike[str] | None = None,
        *,
        known: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(dataset, IndexedDataset):
            dataset = IndexedDataset(dataset)
        self.folder = index_folder(dataset.prefix, folder)
        manifest = read_manifest(self.folder)
        build = f"build it with `castalia index {dataset.prefix}`"
        if manifest is None:
            raise DataError(f"{self.folder}: no index of {dataset.prefix}; {build}")
        require_same_data(self.folder, manifest, known or contents(dataset))
        missing = missing_parts(self.folder, manifest.layout)
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} of {manifest.layout.parts} parts are missing;"
                f" {build}, which goes on where it stopped"
            )
        self.flat = FlatTokens(dataset)
        self.layout = manifest.layout
        self.end = manifest.end
        numbers = range(self.layout.parts)
        self.parts = [Part(self.flat, self.folder, self.layout, number) for number in numbers]

    def verify(self) -> None:
        """Read all parts and compare them with their hashes, as opening and asking do not.

        Raises  DataError naming the damaged ones.
        """
        damaged = [
            str(part_path(self.folder, number))
            for number in range(self.layout.parts)
            if not is_intact(self.folder, self.layout, number)
        ]
        if damaged:
            raise DataError(
                f"{', '.join(damaged)}: other bytes than were written; remove what is damaged, and"
                f" `castalia index {self.flat.dataset.prefix}` builds what is missing"
            )

    def ranks(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """For each part, the places of its sort whose text begins with `ids`."""
        if not len(ids) or min(ids) < 0 or max(ids) >= 1 << (8 * self.layout.width):
            return [(0, 0)] * len(self.parts)
        query = sortable(ids, self.layout.width).tobytes()
        return [part.bounds(query) for part in self.parts]

    def may_cross(self, ids: Sequence[int]) -> bool:
        """Whether these ids could go on from one document into the next."""
        # Where every document has the same last token, only a text with it inside can.
        return len(ids) > 1 and (self.end is None or self.end in ids[:-1])

    def find(self, ids: Sequence[int]) -> Positions:
        """The positions in the file at which `ids` begin, ascending."""
        # A part's sort knows no more than the overlap behind it, so long texts are found by
        # their beginning.
        head = list(ids[: self.layout.overlap])
        found = [
            part.positions(first, stop)
            for part, (first, stop) in zip(self.parts, self.ranks(head), strict=True)
        ]
        positions = np.concatenate([np.empty(0, np.int64), *found])
        if len(ids) > len(head):
            positions = self.compared(positions, ids)
        if self.may_cross(ids):
            positions = self.flat.within_a_document(positions, len(ids))
        return positions

    def compared(self, positions: Positions, ids: Sequence[int]) -> Positions:
        """Those positions at which all of `ids` stand."""
        length = len(ids)
        equal = [
            np.array_equal(self.flat.read(place, place + length), ids)
            for place in positions.tolist()
        ]
        return positions[np.array(equal, bool)]

    def count(self, ids: Sequence[int]) -> int:
        """How often `ids` stand in the file: two binary searches for each part."""
        if len(ids) > self.layout.overlap or self.may_cross(ids):
            return len(self.find(ids))
        return sum(stop - first for first, stop in self.ranks(ids))


class FileScan(Search):
    """A token file without an index, read from front to back for each question."""

    def __init__(self, dataset: IndexedDataset, threads: int | None = None) -> None:
        self.flat = FlatTokens(dataset)
        self.threads = threads or os.cpu_count() or 1

    def find(self, ids: Sequence[int]) -> Positions:
        """The positions in the file at which `ids` begin, ascending."""
        query = np.array(ids, np.int64)
        if not len(query) or query.min() < 0 or query.max() > np.iinfo(self.flat.dataset.dtype).max:
            return np.empty(0, np.int64)
        anchor = rarest(self.flat.read(0, SAMPLE_TOKENS), query)

        def find(first: int) -> Positions:
            # Each block sees as far behind its end as a match that begins in it may reach.
            ids = self.flat.read(first, first + READ_TOKENS + len(query) - 1)
            return matches(ids, query, anchor) + first

        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(find, range(0, len(self), READ_TOKENS)))
        positions = np.concatenate([np.empty(0, np.int64), *found])
        return self.flat.within_a_document(positions, len(query))


def rarest(sample: NDArray[Any], query: NDArray[np.int64]) -> int:
    """The place in the query of the id that is rarest in a sample, by which to look for it."""
    counts = {int(token): int((sample == token).sum()) for token in np.unique(query)}
    return min(range(len(query)), key=lambda place: counts[int(query[place])])


def matches(ids: NDArray[Any], query: NDArray[np.int64], anchor: int = 0) -> Positions:
    """The places at which `query` (n,) begins in `ids` (m,), where `anchor` is looked for first."""
    last = len(ids) - len(query)
    if last < 0:
        return np.empty(0, np.int64)
    begins = np.flatnonzero(ids[anchor : last + 1 + anchor] == ids.dtype.type(query[anchor]))
    for place, token in enumerate(query.tolist()):
        if place != anchor:
            begins = begins[ids[begins + place] == token]
    return begins
