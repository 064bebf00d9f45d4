"""One part of an index: the places of some tokens of a file, sorted by the text that follows.

Source  Manber and Myers 1993, suffix arrays; the sort is Mori's libdivsufsort through pydivsufsort,
        on bytes: ids are written big-endian and only suffixes that begin with an id are kept, as in
        Liu et al. 2024, arXiv:2401.17377 (infini-gram).
"""

import hashlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import CHUNK_BYTES, atomic_write
from castalia.data.indexed import IndexedDataset
from castalia.data.mapped import MappedFile
from castalia.stream.index.flat import FlatTokens, Positions, sortable

PART_TOKENS = 1 << 25
"""Tokens of a part. Sorting 33.5 million 2-byte ids takes about 0.6 GB and some 10 s."""
OVERLAP = 1 << 12
"""Tokens behind a part that its sort sees as well, so that texts of up to so many tokens are found
across the border of two parts. Longer ones are found by their beginning and then compared."""
PLACE = np.dtype("<i4")
"""A place within a part."""
DIGEST_BYTES = hashlib.sha256().digest_size
"""A part ends with the SHA-256 of its places: whole with them or not there, and no race with others
for one list of hashes."""
PURPOSE = "an index of the tokens"


@dataclass(frozen=True)
class Layout:
    """How an index is cut into parts; part i begins at token i · part_tokens."""

    tokens: int
    width: int
    """Bytes of an id in the sort."""
    part_tokens: int = PART_TOKENS
    overlap: int = OVERLAP

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.tokens // self.part_tokens)

    def span(self, number: int) -> range:
        """The tokens of a part."""
        first = number * self.part_tokens
        return range(first, min(first + self.part_tokens, self.tokens))

    def bytes_of(self, number: int) -> int:
        """The size of a part's file."""
        return len(self.span(number)) * PLACE.itemsize + DIGEST_BYTES

    @property
    def bytes(self) -> int:
        """The size of all parts."""
        return sum(map(self.bytes_of, range(self.parts)))


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"part-{number:05d}.places"


def is_whole(folder: Path, layout: Layout, number: int) -> bool:
    """Whether a part is there with the size that it must have; it is renamed when whole."""
    path = part_path(folder, number)
    return path.exists() and path.stat().st_size == layout.bytes_of(number)


def sorted_places(ids: NDArray[Any], count: int, width: int) -> NDArray[np.int32]:
    """The first `count` places of ids (n,), sorted by the ids from each place on; n >= count.

    Raises  ConfigError without pydivsufsort.
    """
    sorter = require("pydivsufsort", "trace", PURPOSE)
    # The sorter refuses arrays that it could not write to, such as views of the file.
    text = np.require(sortable(ids, width), requirements="W")
    places: NDArray[Any] = sorter.divsufsort(text)
    if width > 1:
        # Suffixes that begin within an id are in the way of nothing and are dropped.
        places = places[places % width == 0] // width
    if len(ids) > count:
        places = places[places < count]
    return places.astype(PLACE)


def build_part(dataset: IndexedDataset, folder: Path, layout: Layout, number: int) -> int:
    """Sort a part and write it, atomically; returns its tokens."""
    span = layout.span(number)
    ids = FlatTokens(dataset).read(span.start, span.stop + layout.overlap)
    places = sorted_places(ids, len(span), layout.width)
    with atomic_write(part_path(folder, number), "wb") as file:
        file.write(places.data)
        file.write(hashlib.sha256(places.data).digest())
    return len(span)


def is_intact(folder: Path, layout: Layout, number: int) -> bool:
    """Whether a part's places are those that were written, by their hash. Reads all of it."""
    digest = hashlib.sha256()
    with open(part_path(folder, number), "rb") as file:
        left = layout.bytes_of(number) - DIGEST_BYTES
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        return file.read() == digest.digest()


class Part:
    """A part of an index, memory-mapped.

    Raises  DataError if its file is missing or has another size.
    """

    def __init__(self, flat: FlatTokens, folder: Path, layout: Layout, number: int) -> None:
        self.flat = flat
        self.layout = layout
        self.span = layout.span(number)
        path = part_path(folder, number)
        content = MappedFile(path)
        expected = layout.bytes_of(number)
        if len(content) != expected:
            raise DataError(
                f"{path}: {len(content)} bytes, expected {expected}; build it again with"
                f" `castalia index {flat.dataset.prefix}`"
            )
        content.read_at_random()
        self.places = content.view(PLACE, len(self.span), 0)

    def bounds(self, query: bytes, begin: int = 0, end: int | None = None) -> tuple[int, int]:
        """The places in [begin, end) of the sort whose text begins with `query`: first, stop."""
        ids = len(query) // self.layout.width

        def text(rank: int) -> bytes:
            place = self.span.start + int(self.places[rank])
            return sortable(self.flat.read(place, place + ids), self.layout.width).tobytes()

        # Some 50 reads of the mapped files: the sort is never in memory.
        ranks = range(len(self.places) if end is None else end)
        first = bisect_left(ranks, query, lo=begin, key=text)
        return first, bisect_right(ranks, query, lo=first, key=text)

    def positions(self, first: int, stop: int) -> Positions:
        """The positions in the file of places [first, stop) of the sort, ascending."""
        return np.sort(self.places[first:stop].astype(np.int64)) + self.span.start
