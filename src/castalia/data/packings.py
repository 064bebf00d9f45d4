"""Rows of documents that are not cut to fill them: until one overflows, one a row, or where each fits best.

Source  megatron/data/gpt2_dataset.py:298-368 of GPT-NeoX for `pack_until_overflow` and `unpacked`; Ding et al. 2024,
        arXiv:2404.10830, for best fit.
"""

import bisect
import operator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.packed import Piece

Ints = NDArray[np.int64]


class Layout(NamedTuple):
    """Row k is the stretches [starts[k], starts[k + 1]): of which documents, from which token, how many tokens.

    Shapes  starts (n + 1,); documents, offsets, lengths (p,); shuffle_idx, rows in served order; passes over the data.
    """

    starts: Ints
    documents: Ints
    offsets: Ints
    lengths: Ints
    shuffle_idx: Ints
    epochs: int


class PieceOrder:
    """Which stretches of documents make up each row of at most `seq_length` + 1 tokens, and in which order rows come.

    `config.neox_exact` keeps what GPT-NeoX does: a row goes on with the first token of the document that begins the
    next one, if there is room; documents of a split count from 0; of `pack_until_overflow`, the row that is served
    first stands in the place of the last one. Otherwise documents keep GPT-NeoX's order, less empty ones.

    Shapes  sizes (N,) tokens a document; documents (M,) the ones to use, all by default; left_out (N,) those that no
            row is to have.
    Units   num_samples in rows; 0 takes each document once.
    Time    pack_until_overflow takes a step of Python a document.
    Raises  DataError if no document is left.
    """

    def __init__(
        self,
        sizes: NDArray[np.int32],
        config: DataConfig,
        *,
        num_samples: int,
        seed: int,
        documents: NDArray[np.int32] | None = None,
        left_out: NDArray[np.bool_] | None = None,
    ) -> None:
        used = np.arange(len(sizes)) if documents is None else np.asarray(documents, np.int64)
        self.seq_length, self.exact = config.seq_length, config.neox_exact
        used = np.arange(len(used)) if self.exact else used
        lengths = np.asarray(sizes[used], np.int64)
        self.tokens_per_epoch = int(lengths.sum())
        kept = lengths >= (0 if self.exact else 1)
        if not config.allow_chopped:
            kept &= lengths <= self.seq_length + 1
        if left_out is not None:
            kept &= ~left_out[used]
        if not kept.any():
            reason = "" if left_out is None else " or without a target"
            reason += "" if config.allow_chopped else f" or longer than {self.seq_length + 1} tokens, which"
            reason += "" if config.allow_chopped else " data.allow_chopped=false leaves out"
            raise DataError(f"data.packing {config.packing}: all of {len(used)} documents are empty{reason}")
        build = {"pack_until_overflow": until_overflow, "unpacked": one_a_row, "best_fit": best_fit}[config.packing]
        found = build(lengths, kept, self.seq_length, num_samples, np.random.RandomState(seed), self.exact)
        self.starts, chosen, self.offsets, self.lengths, self.shuffle_idx, self.epochs = found
        self.documents = used[chosen]

    def __len__(self) -> int:
        """The period of what wraps around."""
        return max(1, len(self.shuffle_idx) - self.exact)

    def wrap(self, index: int) -> int:
        """The place served for any place >= 0."""
        return index if index < len(self.shuffle_idx) else index % len(self)


def until_overflow(
    lengths: Ints, kept: NDArray[np.bool_], seq_length: int, rows: int, random: np.random.RandomState, exact: bool
) -> Layout:
    """Documents in random order, shuffled anew for each pass; a row ends where the next document does not fit.

    A document longer than a row stands alone in one, without its end.
    """
    shuffle_idx = np.arange(rows)
    random.shuffle(shuffle_idx)
    turn, epochs = np.arange(len(lengths)), 0
    sizes, left_out = lengths.tolist(), (~kept).tolist()
    starts: list[int] = []
    chosen: list[int] = []
    running, most = 0, rows or len(lengths) + 1
    while len(starts) <= most and (rows or not epochs):
        random.shuffle(turn)
        epochs += 1
        for document in turn.tolist():
            if left_out[document]:
                continue
            if not running or running + sizes[document] > seq_length + 1:
                starts.append(len(chosen))
                running = 0
            running += sizes[document]
            chosen.append(document)
            if len(starts) > most:  # the document that begins the row after the last
                break
    if rows:
        del chosen[starts.pop() :]
    else:
        shuffle_idx = random.permutation(len(starts))
    documents, begins = np.array(chosen, np.int64), np.array([*starts, len(chosen)], np.int64)
    if exact and rows > 1:
        last, first = rows - 1, int(shuffle_idx[0])
        shuffle_idx[shuffle_idx == last] = first
    found = np.minimum(lengths[documents], seq_length + 1)
    return Layout(begins, documents, np.zeros_like(documents), found, shuffle_idx, epochs)


def one_a_row(
    lengths: Ints, kept: NDArray[np.bool_], seq_length: int, rows: int, random: np.random.RandomState, exact: bool
) -> Layout:
    """One document a row, in the order of the file, again from the first after the last; then rows are shuffled."""
    all_kept = np.flatnonzero(kept)
    rows = rows or len(all_kept)
    documents = np.resize(all_kept, rows + exact)  # GPT-NeoX reads one more, whose first token ends the last row
    shuffle_idx = np.arange(rows)
    random.shuffle(shuffle_idx)
    found = np.minimum(lengths[documents], seq_length + 1)
    epochs = -(-rows // len(all_kept))
    return Layout(np.arange(rows + 1), documents, np.zeros_like(documents), found, shuffle_idx, epochs)


def best_fit(
    lengths: Ints, kept: NDArray[np.bool_], seq_length: int, rows: int, random: np.random.RandomState, exact: bool
) -> Layout:
    """The longest stretches first, each into the fullest row that has room for it; rows are shuffled for each pass.

    Documents longer than a row are cut as GPT-NeoX's packing cuts its stream: each next row begins with the last
    token of the one before, so that every token but a document's first is a target once.
    """
    documents = random.permutation(np.flatnonzero(kept))
    cuts = np.maximum(1, -(-(lengths[documents] - 1) // seq_length))
    pieces = np.repeat(documents, cuts)
    offsets = (np.arange(len(pieces)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * seq_length
    sizes = np.minimum(lengths[pieces] - offsets, seq_length + 1)
    row_of = fit(sizes, seq_length + 1)
    order = np.argsort(row_of, kind="stable")
    count = int(row_of.max()) + 1
    starts = np.searchsorted(row_of[order], np.arange(count + 1))
    epochs = max(1, -(-rows // count))
    shuffle_idx = np.concatenate([random.permutation(count) for _ in range(epochs)])
    return Layout(starts, pieces[order], offsets[order], sizes[order], shuffle_idx, epochs)


def fit(sizes: Ints, room: int) -> Ints:
    """Best-fit decreasing: the bin of each item, sizes (p,) in 1..room -> (p,), bins numbered from 0.

    Items of one size go together, so that the time is that of a sort and of at most room²/2 steps of Python.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    free: dict[int, list[Ints]] = {}
    rooms: list[int] = []
    opened = 0
    values, counts = np.unique(sizes, return_counts=True)
    stop = 0
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        start, stop = stop, stop + count
        while start < stop:
            place = bisect.bisect_left(rooms, size)
            have = rooms[place] if place < len(rooms) else room
            each = have // size
            need = -(-(stop - start) // each)
            if place < len(rooms):
                held = np.concatenate(free.pop(rooms.pop(place)))
                keep(free, rooms, have, held[need:])
            else:
                held, opened = np.arange(opened, opened + need), opened + need
            taken = held[:need]
            end = min(stop, start + each * len(taken))
            bins[order[start:end]] = np.repeat(taken, each)[: end - start]
            in_last = end - start - each * (len(taken) - 1)
            keep(free, rooms, have - each * size, taken[:-1])
            keep(free, rooms, have - in_last * size, taken[-1:])
            start = end
    return bins


def keep(free: dict[int, list[Ints]], rooms: list[int], room: int, bins: Ints) -> None:
    """Bins that have so much room left."""
    if room and len(bins):
        if room not in free:
            bisect.insort(rooms, room)
        free.setdefault(room, []).append(bins)


class PieceRows:
    """The rows of `dataset` under `order`: (seq_length + 1,) int64, 0 after the last stretch of a row that ends early.

    Raises  IndexError for a place without a row; DataError if the file holds floats.
    """

    def __init__(self, dataset: IndexedDataset, order: PieceOrder) -> None:
        require_tokens(dataset)
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        row, filled = np.zeros(self.order.seq_length + 1, np.int64), 0
        for document, start, length in self.documents_of(index):
            row[filled : filled + length] = self.dataset.get(document, start, length)
            filled += length
        return row

    def documents_of(self, index: int) -> list[Piece]:
        """The stretches of documents that make up the row served at place `index`, in order; no empty ones."""
        place, order = operator.index(index), self.order
        if not 0 <= place < len(order.shuffle_idx):
            raise IndexError(f"row {index} of {len(order.shuffle_idx)} in {self.dataset.prefix}")
        k = int(order.shuffle_idx[place])
        start, stop = order.starts[k : k + 2].tolist()
        fields = (order.documents, order.offsets, order.lengths)
        pieces = [Piece(*found) for found in zip(*(f[start:stop].tolist() for f in fields), strict=True)]
        room = order.seq_length + 1 - sum(piece.length for piece in pieces)
        if order.exact and room > 0 and stop < len(order.documents):
            pieces.append(Piece(int(order.documents[stop]), 0, min(1, int(order.lengths[stop]))))
        return [piece for piece in pieces if piece.length]


def piece_rows(
    dataset: IndexedDataset, config: DataConfig, rows: int, seed: int, documents: NDArray[np.int32] | None
) -> PieceRows:
    """A source under data.packing; an error names it."""
    try:
        order = PieceOrder(dataset.sizes, config, num_samples=rows, seed=seed, documents=documents)
    except DataError as error:
        raise DataError(f"{dataset.prefix}: {error}") from None
    return PieceRows(dataset, order)
