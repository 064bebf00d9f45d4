"""Rows of documents that are not cut to fill them: until one overflows, one a row, or where each fits best.

Source  megatron/data/gpt2_dataset.py:298-368 of GPT-NeoX for `pack_until_overflow` and `unpacked`; Ding et al. 2024,
        arXiv:2404.10830, for best fit.
"""

import bisect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.config import DataConfig
from castalia.data.fingerprint import array_hash
from castalia.data.indexed import IndexedDataset
from castalia.data.labels import without_targets
from castalia.data.order import chosen, content, numbered
from castalia.data.order_cache import Maps, OrderCache, from_cache
from castalia.data.packed import DocumentRows, Span

Ints = NDArray[np.int64]

VERSION = 1
"""Of the packings here, in the key of kept index maps: another number whenever the same settings give other rows."""
PIECE = 1 << 20
"""Documents whose rows are followed at a time, so that the lists of Python stay small."""


class PackingOrder:
    """Which stretches of documents make up each row of at most `seq_length` + 1 tokens, and in which order rows come.

    Row k is the stretches [starts[k], starts[k + 1]) of `documents`, each from token `offsets` on, `lengths` tokens.

    `config.neox_exact` keeps what GPT-NeoX does: a row goes on with the first token of the document that begins the
    next one, if there is room; documents of a split count from 0; of `pack_until_overflow`, the row that is served
    first stands in the place of the last one. Otherwise documents keep GPT-NeoX's order, less empty ones.

    Shapes  sizes (N,) tokens a document; documents (M,) the ones to use, all by default; left_out (N,) those that no
            row is to have. starts (n + 1,) and shuffle_idx, rows in served order, int64; documents, offsets and
            lengths (p,) int32.
    Units   num_samples in rows; 0 takes each document once. epochs is passes over the documents.
    Time    pack_until_overflow takes a step of Python a row.
    Raises  DataError if no document is left.
    """

    def __init__(
        self,
        sizes: NDArray[np.int32],
        config: DataConfig,
        *,
        num_samples: int,
        seed: int,
        documents: NDArray[np.int32] | range | None = None,
        left_out: NDArray[np.bool_] | None = None,
        cache: OrderCache | None = None,
    ) -> None:
        own, used = chosen(sizes, documents)
        self.seq_length, self.exact = config.seq_length, config.neox_exact
        if self.exact:
            own, used = chosen(sizes, range(len(own)))
        self.tokens_per_epoch = int(own.sum(dtype=np.int64))
        kept = None if left_out is None else ~chosen(left_out, used)[0]
        settings = config.model_dump(include={"seq_length", "neox_exact", "allow_chopped"})
        settings |= {
            "rows": num_samples,
            "seed": seed,
            "kept": None if kept is None else array_hash(kept),
        }
        self.maps = from_cache(
            cache,
            28 * max(num_samples, len(own)),
            lambda: {"order": config.packing, "version": VERSION, **settings, **content(own, used)},
            lambda: piece_maps(own, used, kept, config, num_samples, seed),
        )
        self.epochs = int(self.maps["epochs"][0])

    @property
    def starts(self) -> Ints:
        """Where each row's stretches begin, and where the last one's end."""
        return self.maps["starts"]

    @property
    def documents(self) -> NDArray[np.int32]:
        """The document of each stretch."""
        return self.maps["documents"]

    @property
    def shuffle_idx(self) -> Ints:
        """The row that each place serves."""
        return self.maps["shuffle_idx"]

    def __len__(self) -> int:
        """The period of what wraps around."""
        return max(1, len(self.shuffle_idx) - self.exact)

    def wrap(self, index: int) -> int:
        """The place served for any place >= 0."""
        return index if index < len(self.shuffle_idx) else index % len(self)


def piece_maps(
    sizes: NDArray[np.integer],
    used: range | NDArray[np.int32],
    kept: NDArray[np.bool_] | None,
    config: DataConfig,
    rows: int,
    seed: int,
) -> Maps:
    """The maps of `PackingOrder`, of documents `used` and their `sizes`, as far as they are `kept`."""
    lengths, exact = sizes.astype(np.int64), config.neox_exact
    kept = kept_documents(lengths, config, kept)
    build = {"pack_until_overflow": until_overflow, "unpacked": one_a_row, "best_fit": best_fit}[
        config.packing
    ]
    found = build(lengths, kept, config.seq_length, rows, np.random.RandomState(seed), exact)
    return found | {"documents": numbered(used)[found["documents"]]}


def as_maps(
    starts: Ints, documents: Ints, offsets: Ints, lengths: Ints, shuffle_idx: Ints, epochs: int
) -> dict[str, NDArray[Any]]:
    """Index maps by name; what counts tokens of a document, or documents, is int32 as in the .idx."""
    narrow = {"documents": documents, "offsets": offsets, "lengths": lengths}
    wide = {"starts": starts, "shuffle_idx": shuffle_idx, "epochs": np.array([epochs])}
    return wide | {name: array.astype(np.int32) for name, array in narrow.items()}


def kept_documents(
    lengths: Ints, config: DataConfig, kept: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which of the documents that are `kept`, all by default, make rows: those with a token, or under `neox_exact` all,
    that are short enough.

    Raises  DataError if none does.
    """
    able = lengths >= (0 if config.neox_exact else 1)
    if not config.allow_chopped:
        able &= lengths <= config.seq_length + 1
    if kept is not None:
        able &= kept
    if not able.any():
        reason = "" if kept is None else " or without a target"
        reason += (
            "" if config.allow_chopped else f" or longer than {config.seq_length + 1} tokens, which"
        )
        reason += "" if config.allow_chopped else " data.allow_chopped=false leaves out"
        raise DataError(
            f"data.packing {config.packing}: all of {len(lengths)} documents are empty{reason}"
        )
    return able


def until_overflow(
    lengths: Ints,
    kept: NDArray[np.bool_],
    seq_length: int,
    rows: int,
    random: np.random.RandomState,
    exact: bool,
) -> dict[str, NDArray[Any]]:
    """Documents in random order, shuffled anew for each pass; a row ends where the next document does not fit.

    A document longer than a row stands alone in one, without its end.
    """
    shuffle_idx = np.arange(rows)
    random.shuffle(shuffle_idx)
    turn, open_row = np.arange(len(lengths)), np.empty(0, np.int64)
    passes: list[Ints] = []
    starts: list[Ints] = []
    done = complete = 0  # documents and rows that no further pass changes
    while not passes or (rows and complete < rows):
        random.shuffle(turn)
        stream = np.concatenate((open_row, turn[kept[turn]]))
        begins = row_starts(lengths[stream], seq_length + 1)
        end = int(begins[-1])
        starts.append(done + begins[:-1])
        passes.append(stream[:end])
        done, complete, open_row = done + end, complete + len(begins) - 1, stream[end:]
    all_starts = np.concatenate([*starts, [done, done + len(open_row)]])
    documents = np.concatenate([*passes, open_row])
    if rows:
        all_starts = all_starts[: rows + 1]
    else:
        shuffle_idx = random.permutation(len(all_starts) - 1)
    if exact and rows > 1:
        shuffle_idx[shuffle_idx == rows - 1] = shuffle_idx[0]
    documents = documents[: all_starts[-1]]
    found = np.minimum(lengths[documents], seq_length + 1)
    return as_maps(all_starts, documents, np.zeros_like(documents), found, shuffle_idx, len(passes))


def row_starts(sizes: Ints, room: int) -> Ints:
    """Where rows begin in a run of documents: each takes the next while they fit into `room`, or else a single one.

    The last row has no end yet. An empty document that begins a row is alone in it, as in GPT-NeoX.
    Shapes  sizes (n,), n > 0 -> (rows,), the first 0.
    """
    ends = np.cumsum(sizes)
    following = np.searchsorted(ends, ends - sizes + room, side="right")
    lone = np.arange(1, len(sizes) + 1)
    following = np.where(sizes == 0, lone, np.maximum(following, lone))
    blocks, place = [], 0
    for first in range(0, len(sizes), PIECE):
        jumps, starts = following[first : first + PIECE].tolist(), []
        while place < first + len(jumps):
            starts.append(place)
            place = jumps[place - first]
        blocks.append(np.array(starts, np.int64))
    return np.concatenate(blocks)


def one_a_row(
    lengths: Ints,
    kept: NDArray[np.bool_],
    seq_length: int,
    rows: int,
    random: np.random.RandomState,
    exact: bool,
) -> dict[str, NDArray[Any]]:
    """One document a row, in the order of the file, again from the first after the last; then rows are shuffled."""
    all_kept = np.flatnonzero(kept)
    rows = rows or len(all_kept)
    documents = np.resize(
        all_kept, rows + exact
    )  # GPT-NeoX reads one more, whose first token ends the last row
    shuffle_idx = np.arange(rows)
    random.shuffle(shuffle_idx)
    found = np.minimum(lengths[documents], seq_length + 1)
    epochs = -(-rows // len(all_kept))
    return as_maps(
        np.arange(rows + 1), documents, np.zeros_like(documents), found, shuffle_idx, epochs
    )


def best_fit(
    lengths: Ints,
    kept: NDArray[np.bool_],
    seq_length: int,
    rows: int,
    random: np.random.RandomState,
    exact: bool,
) -> dict[str, NDArray[Any]]:
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
    return as_maps(starts, pieces[order], offsets[order], sizes[order], shuffle_idx, epochs)


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


class PaddedRows(DocumentRows[PackingOrder]):
    """Rows of whole documents or best-fit stretches, which may end early."""

    def pieces(self, row: int) -> list[Span]:
        """The stretches that were laid into row `row`, and the token that GPT-NeoX adds."""
        order, maps = self.order, self.order.maps
        documents, lengths = order.documents, maps["lengths"]
        start, stop = order.starts[row : row + 2].tolist()
        fields = (documents, maps["offsets"], lengths)
        pieces = [
            Span(*found) for found in zip(*(f[start:stop].tolist() for f in fields), strict=True)
        ]
        room = order.seq_length + 1 - sum(piece.length for piece in pieces)
        if order.exact and room > 0 and stop < len(documents):
            pieces.append(Span(int(documents[stop]), 0, min(1, int(lengths[stop]))))
        return pieces


def piece_rows(
    dataset: IndexedDataset,
    config: DataConfig,
    rows: int,
    seed: int,
    documents: range | None,
    labels: IndexedDataset | None,
    cache: OrderCache | None,
) -> PaddedRows:
    """A source under data.packing; an error names it."""
    left_out = None
    if (
        labels is not None and config.neox_exact
    ):  # GPT-NeoX looks at the labels that a row takes, as it counts them
        left_out = without_targets(labels, config.seq_length + (config.packing != "unpacked"))
    options: dict[str, Any] = {"documents": documents, "left_out": left_out, "cache": cache}
    try:
        order = PackingOrder(dataset.sizes, config, num_samples=rows, seed=seed, **options)
    except DataError as error:
        raise DataError(f"{dataset.prefix}: {error}") from None
    return PaddedRows(dataset, order)
