"""From a place in a document to the rows that hold it: each kind of row order, the other way
round."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.data.order import NeoxOrder
from castalia.data.order_cache import IndexMaps
from castalia.data.packed import PackedDataset
from castalia.data.row_source import RowSource
from castalia.data.span_table import bounds_of, runs

Ints = NDArray[np.int64]


class Covers(NamedTuple):
    """Rows that hold the first token of some texts; n of them, each for one text."""

    text: NDArray[Any]
    """(n,) int64, which of the texts."""
    row: NDArray[Any]
    """(n,) int64, the row, by its number before the shuffle."""
    at: NDArray[Any]
    """(n,) int64, where the text begins in the row."""
    whole: NDArray[Any]
    """(n,) bool, whether the row holds all of the text."""
    again: NDArray[Any]
    """(n,) bool, whether the token is the last of the row and the first of the next one as well:
    the same pass over the document, which counts in the other row."""

    def chosen(self, keep: NDArray[Any]) -> "Covers":
        """Those at a mask or at indexes."""
        return Covers(*(values[keep] for values in self))


def group(keys: NDArray[Any], count: int) -> tuple[Ints, Ints]:
    """Items by their key in 0..count - 1: where each key's items begin, and the items.

    Shapes  keys (n,) -> first (count + 1,), items (n,), in order within a key.
    """
    counts = np.bincount(keys, minlength=count)
    first = bounds_of(counts)
    if len(counts) and counts.max() <= 1:
        # A permutation, or a part of one: no sort is needed.
        items = np.empty(len(keys), np.int64)
        items[first[keys]] = np.arange(len(keys))
        return first, items
    return first, np.argsort(keys, kind="stable")


def members(first: Ints, keys: Ints) -> tuple[Ints, Ints]:
    """The items of each of some keys: which of the keys, and the item's place in the grouping."""
    counts = first[keys + 1] - first[keys]
    return np.repeat(np.arange(len(keys)), counts), runs(first[keys], counts)


def document_maps(source: RowSource[Any]) -> IndexMaps:
    """The pieces of each document in the rows of a source.

    Of packed rows: `first` (N + 1,), the passes over each document, and `begin`, where each pass
    begins in the stream. Of others: `first`, and of each piece its `row`, `start` in the document,
    `length`, and the tokens `before` it in the row. Items that are rows themselves need none.
    """
    if is_identity(source):
        return {}
    documents = len(source.dataset)
    if isinstance(source, PackedDataset):
        order: NeoxOrder = source.order
        first, items = group(order.doc_idx, documents)
        sizes = source.dataset.sizes[order.doc_idx].astype(np.int64)
        begin = np.cumsum(sizes) - sizes
        return {"first": first, "begin": begin[items]}
    rows = int(source.order.shuffle_idx.max(initial=-1)) + 1
    table = source.spans_of(np.arange(rows)).without_empty()
    first, items = group(table.documents, documents)
    columns = (table.row_of_span, table.starts, table.lengths, table.offsets)
    names = ("row", "start", "length", "before")
    pieces = {name: column[items] for name, column in zip(names, columns, strict=True)}
    return {"first": first, **pieces}


def is_identity(source: RowSource[Any]) -> bool:
    """Whether row i of a source is the beginning of document i, as of ready rows."""
    return isinstance(source.order.shuffle_idx, range)


def covers(
    source: RowSource[Any], maps: IndexMaps, documents: Ints, offsets: Ints, length: int
) -> Covers:
    """The rows of a source that hold texts of `length` tokens, by document and offset, (m,)."""
    if is_identity(source):
        rows = documents
        fits = offsets + length <= source.order.seq_length + 1
        inside = offsets <= source.order.seq_length
        found = Covers(np.arange(len(rows)), rows, offsets, fits, np.zeros(len(rows), bool))
        return found.chosen(inside & (rows < len(source.order.shuffle_idx)))
    if isinstance(source, PackedDataset):
        return covers_in_stream(source, maps, documents, offsets, length)
    text, piece = members(maps["first"], documents)
    at = offsets[text] - maps["start"][piece]
    own = maps["length"][piece]
    row = maps["row"][piece]
    # Where the piece begins in its row: the lengths of the row's pieces before it.
    before = maps["before"][piece]
    size = source.dataset.sizes[documents[text]]
    goes_on = maps["start"][piece] + own < size
    # Only where documents are cut do neighbouring rows share a token.
    cut_documents = bool(maps["start"].any())
    again = cut_documents & goes_on & (at == own - 1)
    found = Covers(text, row, before + at, at + length <= own, again)
    return found.chosen((at >= 0) & (at < own))


def covers_in_stream(
    source: PackedDataset, maps: IndexMaps, documents: Ints, offsets: Ints, length: int
) -> Covers:
    """`covers` for rows cut from one stream of documents, whose neighbours share a token."""
    text, item = members(maps["first"], documents)
    place = maps["begin"][item] + offsets[text]
    per_row = source.order.seq_length
    row = place // per_row
    at = place - row * per_row
    no = np.zeros(len(row), bool)
    found = Covers(text, row, at, at + length <= per_row + 1, no)
    if length == 1:
        # The first token of a row is the last target of the row before as well.
        shared = np.flatnonzero((at == 0) & (row > 0))
        last = Covers(
            text[shared],
            row[shared] - 1,
            np.full(len(shared), per_row),
            np.ones(len(shared), bool),
            row[shared] < len(source.order.shuffle_idx),
        )
        found = Covers(*(np.concatenate(pair) for pair in zip(found, last, strict=True)))
    # What is left behind the last row of the stream is in none.
    return found.chosen(found.row < len(source.order.shuffle_idx))
