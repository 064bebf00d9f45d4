"""Preference data: rows of pairs of a preferred and a rejected document, in GPT-NeoX's order.

Source  megatron/data/pairwise_dataset.py of GPT-NeoX. Its `packed` does not work (the index is
        never built), and its `allow_chopped` under pack_until_overflow leaves out the short pairs,
        which is not reproduced here.
"""

import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.core.errors import ConfigError
from castalia.data.config import PAIR_PACKINGS, DataConfig
from castalia.data.indexed import IndexedDataset
from castalia.data.labels import IGNORED, open_labels, without_targets
from castalia.data.order_cache import OrderCache
from castalia.data.packing_order import PackingOrder
from castalia.data.pair_files import open_references, require_pair
from castalia.data.row_source import DocumentSpan, RowSource

Labels = tuple[IndexedDataset | None, IndexedDataset | None]


class Side(NamedTuple):
    """The files of one side of the pairs."""

    tokens: IndexedDataset
    labels: IndexedDataset | None = None
    """A label for each token."""
    reference: IndexedDataset | None = None
    """A reference model's log-probability of each token."""


class PairOrder(PackingOrder):
    """The pairs in each row and the serving order: the longer document of a pair decides.

    Pairs with a side without targets are left out, and but for `neox_exact` those whose answers are
    the same: `unanswered` and `alike` are their numbers. Under `unpacked` the first rows repeat, as
    many as there are documents, as in GPT-NeoX.

    Raises  DataError if no pair is left.
    """

    def __init__(
        self,
        tokens: tuple[IndexedDataset, IndexedDataset],
        labels: Labels,
        config: DataConfig,
        rows: int,
        seed: int,
        documents: NDArray[np.int32] | range | None = None,
        cache: OrderCache | None = None,
    ) -> None:
        longer = np.maximum(tokens[0].sizes, tokens[1].sizes)
        # GPT-NeoX looks for targets among as many labels as fit into a row, counted differently in
        # the two packings.
        looked_at = config.seq_length + (config.packing != "unpacked")
        left_out = np.zeros(len(longer), np.bool_)
        for side in labels:
            if side is not None:
                left_out |= without_targets(side, looked_at)
        self.unanswered = int(left_out.sum())
        same = np.zeros(0, np.int64)
        # Two prompts may well have the same answer, which their own row is to be learned from.
        if not config.neox_exact and not config.mismatched:
            same = alike(*tokens)
        self.alike = int((~left_out[same]).sum())
        left_out[same] = True
        super().__init__(
            longer,
            config,
            num_samples=rows,
            seed=seed,
            documents=documents,
            left_out=left_out,
            cache=cache,
        )
        self.served: NDArray[Any] = self.maps["shuffle_idx"]
        if config.packing == "unpacked":
            self.served = self.served % (len(longer) if documents is None else len(documents))

    @property
    def shuffle_idx(self) -> NDArray[Any]:
        """The row served at each place."""
        return self.served

    def pairs_of(self, row: int) -> list[int]:
        """The pairs in row `row`."""
        start, stop = self.starts[row : row + 2].tolist()
        documents: list[int] = self.documents[start:stop].tolist()
        return documents

    def extra_of(self, row: int) -> int | None:
        """The pair whose first token follows a row under `exact`; None without one."""
        stop = int(self.starts[row + 1])
        if self.exact and stop < len(self.documents):
            return int(self.documents[stop])
        return None


def alike(chosen: IndexedDataset, rejected: IndexedDataset) -> NDArray[np.int64]:
    """The pairs whose documents are the same on both sides."""
    candidates = np.flatnonzero(chosen.sizes == rejected.sizes)
    same = [np.array_equal(chosen[pair], rejected[pair]) for pair in candidates.tolist()]
    return candidates[np.array(same, np.bool_)]


class SideRows(RowSource[PairOrder]):
    """Rows of one side of the pairs: whole documents, cut where they are longer than a row."""

    padded = True

    def spans(self, row: int) -> list[DocumentSpan]:
        """The documents of the row's pairs, and GPT-NeoX's stray token under `neox_exact`."""
        wanted = [(pair, int(self.dataset.sizes[pair])) for pair in self.order.pairs_of(row)]
        extra = self.order.extra_of(row)
        if extra is not None:
            wanted.append((extra, min(1, int(self.dataset.sizes[extra]))))
        room = self.order.seq_length + 1
        spans = []
        for document, size in wanted:
            length = min(size, room)
            spans.append(DocumentSpan(document, 0, length))
            room -= length
        return spans


class PairwiseDataset:
    """Rows of pairs; `pairs[i]` is a dict of arrays, the row served at place i.

    Keys    `pos`, `neg` (seq_length + 1,) int64, padded with 0; with labels `pos_label`,
            `neg_label`, int64, -100 in the padding and where a token is not a target; with
            references `pos_ref`, `neg_ref`, float32, padded with 0.

    Document d of one file forms a pair with document d of the other; the longer of the two decides
    the packing, `unpacked` (one pair per row) or `pack_until_overflow`. Pairs with a side without
    targets are left out. Rows are GPT-NeoX's, which includes that `unpacked` repeats its first
    rows, as many as there are documents. With `config.neox_exact` each row goes on with the first
    token of the pair that begins the next one.

    Units   num_samples in rows; seq_length, in tokens, is that of `config`.
    Raises  ConfigError about the packing; DataError naming two files that do not match, or if no
            pair is left.
    """

    def __init__(
        self,
        pos: str,
        neg: str,
        config: DataConfig,
        *,
        num_samples: int,
        seed: int,
        labels: tuple[str, str] | None = None,
        references: tuple[str, str] | None = None,
        documents: NDArray[np.int32] | None = None,
    ) -> None:
        if config.packing not in PAIR_PACKINGS:
            raise ConfigError(
                f"data.packing {config.packing!r} does not support pairs; use unpacked or"
                " pack_until_overflow"
            )
        tokens = (IndexedDataset(pos), IndexedDataset(neg))
        require_pair(*tokens)
        own_labels = open_labels(labels or (), tokens, "labels") or (None, None)
        own_references = open_references(references or (), tokens, config.seq_length)
        self.pos, self.neg = map(Side, tokens, own_labels, own_references or (None, None))
        self.order = PairOrder(
            tokens, (own_labels[0], own_labels[1]), config, num_samples, seed, documents
        )
        self.shuffle_idx = self.order.shuffle_idx

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __repr__(self) -> str:
        return f"PairwiseDataset({len(self):,} rows, {self.pos.tokens!r}, {self.neg.tokens!r})"

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        documents, extra = self.documents_of(index)
        row: dict[str, NDArray[Any]] = {}
        for name, side in (("pos", self.pos), ("neg", self.neg)):
            row[name] = self.joined(side.tokens, documents, extra, np.int64, 0)
            if side.labels is not None:
                row[f"{name}_label"] = self.joined(side.labels, documents, extra, np.int64, IGNORED)
            if side.reference is not None:
                row[f"{name}_ref"] = self.joined(side.reference, documents, extra, np.float32, 0)
        return row

    def documents_of(self, index: int) -> tuple[list[int], int | None]:
        """The pairs in the row at place `index`, and the pair whose first token follows, if any.

        Raises  IndexError for a place without a row.
        """
        place = operator.index(index)
        order = self.order
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.pos.tokens.prefix}")
        row = int(self.shuffle_idx[place])
        return order.pairs_of(row), order.extra_of(row)

    def joined(
        self,
        file: IndexedDataset,
        documents: list[int],
        extra: int | None,
        dtype: DTypeLike,
        padding: int,
    ) -> NDArray[Any]:
        """A file's values for a row's documents, (seq_length + 1,): cut or padded."""
        values = [file[document] for document in documents]
        if extra is not None:
            values.append(file[extra][:1])
        joined = np.concatenate(values)[: self.order.seq_length + 1]
        row = np.full(self.order.seq_length + 1, padding, dtype)
        row[: len(joined)] = joined
        return row
