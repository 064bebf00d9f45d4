"""The tokens of a token file as one array, and as bytes whose order is that of the ids."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import DataError
from castalia.data.indexed import IndexedDataset, require_tokens

Positions = NDArray[np.int64]
"""Places of tokens, counted from the first token of the file."""

BLOCK = 1 << 22
"""Tokens, or documents, read at a time in a pass over the file."""


class Survey(NamedTuple):
    """Facts about a token file that take one pass over it."""

    largest: int
    """The largest id."""
    end: int | None
    """The id that ends every document that has tokens; None if they end differently."""


class FlatTokens:
    """The documents of a file one after the other, without regard to their borders.

    Raises  DataError if they do not follow one another in the .bin, or are not integers.
    """

    def __init__(self, dataset: IndexedDataset) -> None:
        require_tokens(dataset)
        self.dataset = dataset
        self.itemsize = dataset.dtype.itemsize
        self.require_gapless()
        self.tokens = int(dataset.sizes.sum(dtype=np.int64))

    def __len__(self) -> int:
        return self.tokens

    def require_gapless(self) -> None:
        """Raises  DataError unless each document begins where the one before ends."""
        sizes = self.dataset.sizes
        pointers = self.dataset.pointers
        expected = 0
        for first in range(0, len(sizes), BLOCK):
            own = sizes[first : first + BLOCK].astype(np.int64) * self.itemsize
            begins = expected + np.cumsum(own) - own
            if (pointers[first : first + BLOCK] != begins).any():
                raise DataError(
                    f"{self.dataset.prefix}: its documents do not follow one another in the .bin,"
                    " which an index needs; write it anew with `castalia data merge"
                    f" {self.dataset.prefix} --output NEW`, or search with --scan"
                )
            expected = int(begins[-1] + own[-1])

    def read(self, first: int, stop: int) -> NDArray[Any]:
        """Tokens [first, stop) of the file, in its dtype, fewer at its end."""
        stop = min(stop, self.tokens)
        return self.dataset.buffer.view(
            self.dataset.dtype, max(0, stop - first), first * self.itemsize
        )

    def gather(self, positions: Positions) -> NDArray[np.int64]:
        """The tokens at some positions, (n,)."""
        if not self.dataset.shards:
            return self.read(0, self.tokens)[positions].astype(np.int64)
        # Shards are several files, of which no single array can be made without a copy.
        tokens = [self.read(place, place + 1)[0] for place in positions.tolist()]
        return np.array(tokens, np.int64)

    def documents_of(self, positions: Positions) -> tuple[NDArray[np.int64], Positions]:
        """The document of each position, and the place within it."""
        places = positions * self.itemsize
        # Of an empty document and the next, which begin at the same byte, the last one has it.
        documents = np.searchsorted(self.dataset.pointers, places, side="right") - 1
        offsets = positions - self.dataset.pointers[documents] // self.itemsize
        return documents, offsets

    def within_a_document(self, positions: Positions, length: int) -> Positions:
        """Those positions from which `length` tokens stay within one document."""
        documents, offsets = self.documents_of(positions)
        return positions[offsets + length <= self.dataset.sizes[documents]]

    def survey(self) -> Survey:
        """The facts that decide how an index is built.

        Raises  DataError if an id is negative.
        """
        largest = 0
        ends: set[int] = set()
        for first in range(0, self.tokens, BLOCK):
            stop = min(first + BLOCK, self.tokens)
            ids = self.read(first, stop)
            if int(ids.min()) < 0:
                raise DataError(f"{self.dataset.prefix}: holds token {ids.min()}, expected ids")
            largest = max(largest, int(ids.max()))
            last = ids[self.borders(first, stop) - 1 - first]
            ends.update(np.unique(last).tolist())
        if len(ends) != 1:
            return Survey(largest, None)
        return Survey(largest, ends.pop())

    def borders(self, first: int, stop: int) -> Positions:
        """The ends of documents in (first, stop], as positions one past their last token."""
        pointers = self.dataset.pointers
        places = np.array([first, stop], np.int64) * self.itemsize
        begin, end = np.searchsorted(pointers, places, side="right")
        inner = pointers[begin:end] // self.itemsize
        if stop < self.tokens:
            return inner
        # No document begins where the last one ends.
        return np.append(inner, self.tokens)


def width_of(largest: int) -> int:
    """Bytes that hold every id up to `largest`."""
    return max(1, (largest.bit_length() + 7) // 8)


def sortable(ids: ArrayLike, width: int) -> NDArray[np.uint8]:
    """Ids as big-endian bytes, `width` each: comparing the bytes compares the ids.

    Shapes  (n,) -> (n · width,).
    """
    wide = next(size for size in (1, 2, 4, 8) if size >= width)
    whole = np.ascontiguousarray(ids, f">u{wide}").view(np.uint8)
    if wide == width:
        return whole
    return np.ascontiguousarray(whole.reshape(-1, wide)[:, wide - width :]).reshape(-1)
