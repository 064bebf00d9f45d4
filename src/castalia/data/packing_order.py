"""Orders of rows that hold whole documents, or pieces of long ones, and so may end early.

Three packings: documents until one overflows the row, one document per row, and best fit.
Source  megatron/data/gpt2_dataset.py:298-368 of GPT-NeoX for `pack_until_overflow` and `unpacked`;
        Ding et al. 2024, arXiv:2404.10830, for best fit.
"""

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.config import DataConfig
from castalia.data.fingerprint import array_hash
from castalia.data.order import DocumentNumbers, as_array, data_key, select
from castalia.data.order_cache import IndexMaps, OrderCache, from_cache

Ints = NDArray[np.int64]

VERSION = 1
"""Version of the packings, part of the key of cached maps. Raise it whenever the same settings give
other rows."""
BLOCK = 1 << 20
"""Documents per block in `row_starts`, which bounds the memory of its Python lists."""


class PackingOrder:
    """The spans of documents in each row of at most `seq_length` + 1 tokens, and the serving order.

    Row k consists of the spans [starts[k], starts[k + 1]): span i is `lengths[i]` tokens of
    `documents[i]` from token `offsets[i]` on.

    `config.neox_exact` reproduces GPT-NeoX's faults. A row with room ends with the first token of
    the document that begins the next row; the documents of a split are numbered from 0; under
    `pack_until_overflow` the row served first takes the place of the last one. Otherwise documents
    keep GPT-NeoX's order, without empty ones.

    Shapes  sizes (N,) tokens per document; documents (M,) the ones to use, all by default; left_out
            (N,) documents that no row may hold. starts (n + 1,) and shuffle_idx, rows in served
            order, int64; documents, offsets and lengths (p,) int32.
    Units   num_samples in rows; 0 means each document once. epochs is the passes over the
            documents.
    Time    pack_until_overflow takes one Python step per row.
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
        own_sizes, numbers = select(sizes, documents)
        self.seq_length = config.seq_length
        self.exact = config.neox_exact
        if self.exact:
            own_sizes, numbers = select(sizes, range(len(own_sizes)))
        self.tokens_per_epoch = int(own_sizes.sum(dtype=np.int64))
        kept = None if left_out is None else ~select(left_out, numbers)[0]

        def key() -> dict[str, Any]:
            settings = config.model_dump(include={"seq_length", "neox_exact", "allow_chopped"})
            settings |= {"rows": num_samples, "seed": seed}
            settings |= {"kept": None if kept is None else array_hash(kept)}
            data = data_key(own_sizes, numbers)
            return {"order": config.packing, "version": VERSION, **settings, **data}

        def build() -> IndexMaps:
            return packing_maps(own_sizes, numbers, kept, config, num_samples, seed)

        # Per row about one span (12 bytes), a start and a place (8 each).
        size = 28 * max(num_samples, len(own_sizes))
        self.maps = from_cache(cache, size, key, build)
        self.epochs = int(self.maps["epochs"][0])

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens of a document's own in a row; the rest of it is padding."""
        return float(self.maps["lengths"].sum(dtype=np.int64) / max(1, len(self.starts) - 1))

    @property
    def starts(self) -> Ints:
        """The first span of each row, and the end of the last row's spans."""
        return self.maps["starts"]

    @property
    def documents(self) -> NDArray[np.int32]:
        """The document of each span."""
        return self.maps["documents"]

    @property
    def shuffle_idx(self) -> Ints:
        """The row served at each place."""
        return self.maps["shuffle_idx"]

    def __len__(self) -> int:
        """The period after which places repeat."""
        return max(1, len(self.shuffle_idx) - self.exact)

    def wrap(self, index: int) -> int:
        """The place served for any place >= 0."""
        if index < len(self.shuffle_idx):
            return index
        return index % len(self)


class PackingTask(NamedTuple):
    """Input of a packing."""

    lengths: Ints
    """Tokens per document, (N,)."""
    kept: NDArray[np.bool_]
    """Documents to use, (N,)."""
    seq_length: int
    rows: int
    """Rows to make; 0 means each document once."""
    random: np.random.RandomState
    exact: bool
    """Reproduce GPT-NeoX's faults."""

    @property
    def room(self) -> int:
        """Tokens of a row, the last target included."""
        return self.seq_length + 1


def packing_maps(
    sizes: NDArray[np.integer],
    numbers: DocumentNumbers,
    kept: NDArray[np.bool_] | None,
    config: DataConfig,
    rows: int,
    seed: int,
) -> IndexMaps:
    """The maps of `PackingOrder` for the documents `numbers`, with their `sizes`."""
    lengths = sizes.astype(np.int64)
    kept = kept_documents(lengths, config, kept)
    random = np.random.RandomState(seed)
    task = PackingTask(lengths, kept, config.seq_length, rows, random, config.neox_exact)
    maps = PACKINGS[config.packing](task)
    # The packings count the documents in use from 0; the maps hold their numbers in the file.
    return maps | {"documents": as_array(numbers)[maps["documents"]]}


def as_maps(
    starts: Ints, documents: Ints, offsets: Ints, lengths: Ints, shuffle_idx: Ints, epochs: int
) -> dict[str, NDArray[Any]]:
    """Index maps by name. Counts of documents, or of tokens in one, are int32, as in the .idx."""
    maps: dict[str, NDArray[Any]] = {
        "starts": starts,
        "shuffle_idx": shuffle_idx,
        "epochs": np.array([epochs]),
    }
    for name, array in (("documents", documents), ("offsets", offsets), ("lengths", lengths)):
        maps[name] = array.astype(np.int32)
    return maps


def kept_documents(
    lengths: Ints, config: DataConfig, kept: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which documents make rows, (N,): those in `kept` that are neither empty nor too long.

    `kept` None means all. Under `neox_exact` empty documents count as well.
    Raises  DataError if no document is left.
    """
    shortest = 0 if config.neox_exact else 1
    usable = lengths >= shortest
    if not config.allow_chopped:
        usable &= lengths <= config.seq_length + 1
    if kept is not None:
        usable &= kept
    if not usable.any():
        reasons = ["empty"]
        if kept is not None:
            reasons.append("without a target")
        if not config.allow_chopped:
            limit = config.seq_length + 1
            reasons.append(f"longer than {limit} tokens, which data.allow_chopped=false leaves out")
        raise DataError(
            f"data.packing {config.packing}: all of {len(lengths)} documents are"
            f" {' or '.join(reasons)}"
        )
    return usable


def until_overflow(task: PackingTask) -> dict[str, NDArray[Any]]:
    """Documents in random order, for each pass anew; a row ends where the next one does not fit.

    A document longer than a row is alone in its row, without its end.
    """
    random = task.random
    # GPT-NeoX shuffles the rows first and the documents after, from one random stream.
    shuffle_idx = np.arange(task.rows)
    random.shuffle(shuffle_idx)
    turn = np.arange(len(task.lengths))
    open_row = np.empty(
        0, np.int64
    )  # documents of the last row, which the next pass may go on filling
    passes: list[Ints] = []
    starts: list[Ints] = []
    spans_done = 0
    rows_done = 0
    while not passes or (task.rows and rows_done < task.rows):
        random.shuffle(turn)
        stream = np.concatenate((open_row, turn[task.kept[turn]]))
        begins = row_starts(task.lengths[stream], task.room)
        end = int(begins[-1])
        starts.append(spans_done + begins[:-1])
        passes.append(stream[:end])
        open_row = stream[end:]
        spans_done += end
        rows_done += len(begins) - 1
    all_starts = np.concatenate([*starts, [spans_done, spans_done + len(open_row)]])
    documents = np.concatenate([*passes, open_row])
    if task.rows:
        all_starts = all_starts[: task.rows + 1]
    else:
        shuffle_idx = random.permutation(len(all_starts) - 1)
    if task.exact and task.rows > 1:
        shuffle_idx[shuffle_idx == task.rows - 1] = shuffle_idx[0]
    documents = documents[: all_starts[-1]]
    offsets = np.zeros_like(documents)
    lengths = np.minimum(task.lengths[documents], task.room)
    return as_maps(all_starts, documents, offsets, lengths, shuffle_idx, len(passes))


def row_starts(sizes: Ints, room: int) -> Ints:
    """The document that begins each row, where a row takes documents while they fit into `room`.

    A document that does not fit into an empty row is alone in it, and so is an empty document that
    begins a row, as in GPT-NeoX. The last row has no end yet.
    Shapes  sizes (n,), n > 0 -> (rows,), the first 0.
    """
    ends = np.cumsum(sizes)
    # For every document, the beginning of the next row if a row began here. Following these jumps
    # from document 0 then takes one step per row, not per document.
    following = np.searchsorted(ends, ends - sizes + room, side="right")
    alone = np.arange(1, len(sizes) + 1)
    following = np.where(sizes == 0, alone, np.maximum(following, alone))
    blocks = []
    place = 0
    for first in range(0, len(sizes), BLOCK):
        # A list, because indexing one is several times faster than indexing an array.
        jumps = following[first : first + BLOCK].tolist()
        starts = []
        while place < first + len(jumps):
            starts.append(place)
            place = jumps[place - first]
        blocks.append(np.array(starts, np.int64))
    return np.concatenate(blocks)


def one_per_row(task: PackingTask) -> dict[str, NDArray[Any]]:
    """One document per row, in file order and again from the first; then rows are shuffled."""
    all_kept = np.flatnonzero(task.kept)
    rows = task.rows or len(all_kept)
    # GPT-NeoX reads one document more, whose first token ends the last row.
    documents = np.resize(all_kept, rows + task.exact)
    shuffle_idx = np.arange(rows)
    task.random.shuffle(shuffle_idx)
    offsets = np.zeros_like(documents)
    lengths = np.minimum(task.lengths[documents], task.room)
    epochs = -(-rows // len(all_kept))
    return as_maps(np.arange(rows + 1), documents, offsets, lengths, shuffle_idx, epochs)


def best_fit(task: PackingTask) -> dict[str, NDArray[Any]]:
    """The longest spans first, each into the fullest row with room; shuffled for each pass.

    Longer documents are cut as GPT-NeoX's packing cuts its stream: each following row begins with
    the last token of the one before, so that every token except a document's first is a target
    once.
    """
    documents = task.random.permutation(np.flatnonzero(task.kept))
    cuts = np.maximum(1, -(-(task.lengths[documents] - 1) // task.seq_length))
    spans = np.repeat(documents, cuts)
    number_in_document = np.arange(len(spans)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    offsets = number_in_document * task.seq_length
    sizes = np.minimum(task.lengths[spans] - offsets, task.room)
    row_of = fit(sizes, task.room)
    by_row = np.argsort(row_of, kind="stable")
    count = int(row_of.max()) + 1
    starts = np.searchsorted(row_of[by_row], np.arange(count + 1))
    epochs = max(1, -(-task.rows // count))
    shuffle_idx = np.concatenate([task.random.permutation(count) for _ in range(epochs)])
    return as_maps(starts, spans[by_row], offsets[by_row], sizes[by_row], shuffle_idx, epochs)


def fit(sizes: Ints, room: int) -> Ints:
    """Best-fit decreasing bin packing: the bin of each item.

    Shapes  sizes (p,) in 1..room -> (p,), bins numbered from 0.
    Time    one sort and at most room²/2 Python steps, because items of one size are placed
            together.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    free: dict[int, list[Ints]] = {}  # room left -> the bins that have it
    rooms: list[int] = []  # the keys of `free`, sorted
    opened = 0
    values, counts = np.unique(sizes, return_counts=True)
    stop = 0
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        start = stop
        stop = start + count
        while start < stop:
            place = bisect.bisect_left(rooms, size)
            has_room = place < len(rooms)
            left = rooms[place] if has_room else room
            per_bin = left // size
            needed = -(-(stop - start) // per_bin)
            if has_room:
                candidates = np.concatenate(free.pop(rooms.pop(place)))
                keep(free, rooms, left, candidates[needed:])
            else:
                candidates = np.arange(opened, opened + needed)
                opened += needed
            filled = candidates[:needed]
            end = min(stop, start + per_bin * len(filled))
            bins[order[start:end]] = np.repeat(filled, per_bin)[: end - start]
            # Every bin but the last takes `per_bin` items.
            in_last = end - start - per_bin * (len(filled) - 1)
            keep(free, rooms, left - per_bin * size, filled[:-1])
            keep(free, rooms, left - in_last * size, filled[-1:])
            start = end
    return bins


def keep(free: dict[int, list[Ints]], rooms: list[int], room: int, bins: Ints) -> None:
    """Record bins that have `room` left. Full bins are dropped."""
    if room and len(bins):
        if room not in free:
            bisect.insort(rooms, room)
        free.setdefault(room, []).append(bins)


PACKINGS: dict[str, Callable[[PackingTask], dict[str, NDArray[Any]]]] = {
    "pack_until_overflow": until_overflow,
    "unpacked": one_per_row,
    "best_fit": best_fit,
}
"""data.packing -> the function that lays out its rows; `packed` is `NeoxOrder`."""
