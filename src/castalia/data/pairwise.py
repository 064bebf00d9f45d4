"""Preference data: pairs of a preferred and a rejected document, row by row, in GPT-NeoX's order; rewards.

Source  megatron/data/pairwise_dataset.py of GPT-NeoX; its `packed` is none (the index is never made), and its
        `allow_chopped` under pack_until_overflow leaves out the short ones, which is not repeated here.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.labels import IGNORED, open_labels, without_targets
from castalia.data.packing_order import PackingOrder
from castalia.data.sidecar import read_record


class Side(NamedTuple):
    """The files of one side: tokens, and beside each token a label and what a reference model gave it, if any."""

    tokens: IndexedDataset
    labels: IndexedDataset | None = None
    reference: IndexedDataset | None = None


class PairwiseDataset:
    """Rows of pairs: `pairs[i]` holds what is served at place i, `pos` and `neg` (seq_length + 1,) int64, 0 after
    their ends; with labels `pos_label`, `neg_label`, -100 there and where a token is no target; with references
    `pos_ref`, `neg_ref` float32.

    Document d of one file is the pair of document d of the other; the longer of the two counts for the packing,
    `unpacked` (a pair a row) or `pack_until_overflow`. Pairs of which one side has no target are left out. Rows are
    GPT-NeoX's, also in that `unpacked` serves the first as many rows as there are documents again and again; with
    `config.neox_exact` each row goes on with the first token of the pair that begins the next one.

    Units   num_samples in rows; seq_length, in tokens, is that of `config`.
    Raises  ConfigError about the packing; DataError naming two files that do not fit, or if no pair is left.
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
        if config.packing not in ("unpacked", "pack_until_overflow"):
            raise ConfigError(
                f"data.packing {config.packing}: pairs are unpacked or pack_until_overflow"
            )
        tokens = open_pair(pos, neg)
        own_labels = open_labels(labels or (), tokens, "labels") or (None, None)
        self.pos, self.neg = (
            Side(*files)
            for files in zip(tokens, own_labels, open_references(references, tokens), strict=True)
        )
        longer = np.maximum(tokens[0].sizes, tokens[1].sizes)
        used = np.arange(len(longer), dtype=np.int32) if documents is None else documents
        looked_at = config.seq_length + (config.packing != "unpacked")  # tokens, as GPT-NeoX has it
        left_out = np.zeros(len(longer), np.bool_)
        for side in (self.pos, self.neg):
            if side.labels is not None:
                left_out |= without_targets(side.labels, looked_at)
        self.order = PackingOrder(
            longer, config, num_samples=num_samples, seed=seed, documents=used, left_out=left_out
        )
        self.shuffle_idx = self.order.shuffle_idx
        if config.packing == "unpacked":
            self.shuffle_idx = self.shuffle_idx % len(used)

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        documents, leak = self.documents_of(index)
        row: dict[str, NDArray[Any]] = {}
        for name, side in (("pos", self.pos), ("neg", self.neg)):
            row[name] = self.joined(side.tokens, documents, leak, np.int64, 0)
            if side.labels is not None:
                row[f"{name}_label"] = self.joined(side.labels, documents, leak, np.int64, IGNORED)
            if side.reference is not None:
                row[f"{name}_ref"] = self.joined(side.reference, documents, leak, np.float32, 0)
        return row

    def documents_of(self, index: int) -> tuple[list[int], int | None]:
        """The pairs that make up the row served at place `index`, and that whose first token follows, if one does.

        Raises  IndexError for a place without a row.
        """
        place, order = operator.index(index), self.order
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.pos.tokens.prefix}")
        k = int(self.shuffle_idx[place])
        start, stop = order.starts[k : k + 2].tolist()
        follows = order.exact and stop < len(order.documents)
        return order.documents[start:stop].tolist(), int(order.documents[stop]) if follows else None

    def joined(
        self,
        file: IndexedDataset,
        documents: list[int],
        leak: int | None,
        dtype: DTypeLike,
        empty: int,
    ) -> NDArray[Any]:
        """What a file has of a row's documents, (seq_length + 1,): cut, or filled with `empty`."""
        pieces = [file[document] for document in documents]
        pieces += [] if leak is None else [file[leak][:1]]
        found = np.concatenate(pieces)[: self.order.seq_length + 1]
        row = np.full(self.order.seq_length + 1, empty, dtype)
        row[: len(found)] = found
        return row


def open_pair(pos: str, neg: str) -> list[IndexedDataset]:
    """The token files of both sides.

    Raises  DataError if they do not have the same number of documents, or a record says that these are not the same.
    """
    files = [IndexedDataset(pos), IndexedDataset(neg)]
    for file in files:
        require_tokens(file)
    if len(files[0]) != len(files[1]):
        raise DataError(
            f"{pos} has {len(files[0])} documents and {neg} has {len(files[1])}: document d of one is the pair of"
            " document d of the other; prepare both with one command"
        )
    if uneven := (read_record(files[0].prefix) or {}).get("uneven"):
        raise DataError(
            f"{pos}: {uneven} documents had a text under one key and none under another, so document d of {neg} is not"
            " always the pair of document d; leave them out of the corpus and prepare it again"
        )
    return files


def open_references(
    prefixes: tuple[str, str] | None, tokens: Sequence[IndexedDataset]
) -> Sequence[IndexedDataset | None]:
    """Per token, the log-probabilities of a reference model.

    Raises  DataError if one does not fit its token file.
    """
    if prefixes is None:
        return (None, None)
    files = [IndexedDataset(prefix) for prefix in prefixes]
    for file, of in zip(files, tokens, strict=True):
        if file.dtype.kind != "f" or not np.array_equal(file.sizes, of.sizes):
            raise DataError(
                f"{file.prefix} does not fit {of.prefix}: a reference is a float for each of its tokens"
            )
    return files
