"""Preference data: rows of pairs of a preferred and a rejected document, in GPT-NeoX's order.

Source  megatron/data/pairwise_dataset.py of GPT-NeoX. Its `packed` does not work (the index is
        never built), and its `allow_chopped` under pack_until_overflow leaves out the short pairs,
        which is not reproduced here.
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
    """The files of one side of the pairs."""

    tokens: IndexedDataset
    labels: IndexedDataset | None = None
    """A label for each token."""
    reference: IndexedDataset | None = None
    """A reference model's log-probability of each token."""


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
        if config.packing not in ("unpacked", "pack_until_overflow"):
            raise ConfigError(
                f"data.packing {config.packing!r} does not support pairs; use unpacked or"
                " pack_until_overflow"
            )
        tokens = open_pair(pos, neg)
        own_labels = open_labels(labels or (), tokens, "labels") or (None, None)
        own_references = open_references(references, tokens)
        self.pos = Side(tokens[0], own_labels[0], own_references[0])
        self.neg = Side(tokens[1], own_labels[1], own_references[1])
        longer = np.maximum(tokens[0].sizes, tokens[1].sizes)
        used = np.arange(len(longer), dtype=np.int32) if documents is None else documents
        # GPT-NeoX looks for targets among as many labels as fit into a row, counted differently in
        # the two packings.
        looked_at = config.seq_length + (config.packing != "unpacked")
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
        start, stop = order.starts[row : row + 2].tolist()
        extra = None
        if order.exact and stop < len(order.documents):
            extra = int(order.documents[stop])
        return order.documents[start:stop].tolist(), extra

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


def open_pair(pos: str, neg: str) -> list[IndexedDataset]:
    """The token files of both sides.

    Raises  DataError if they differ in their number of documents, or the record says that their
            documents do not correspond.
    """
    files = [IndexedDataset(pos), IndexedDataset(neg)]
    for file in files:
        require_tokens(file)
    if len(files[0]) != len(files[1]):
        raise DataError(
            f"{pos} has {len(files[0])} documents and {neg} has {len(files[1])}, but document d of"
            " one is the pair of document d of the other; prepare both with one command"
        )
    uneven = (read_record(files[0].prefix) or {}).get("uneven")
    if uneven:
        raise DataError(
            f"{pos}: {uneven} documents had a text under one key and none under another, so"
            f" document d of {neg} is not always the pair of document d; remove them from the"
            " corpus and prepare it again"
        )
    return files


def open_references(
    prefixes: tuple[str, str] | None, tokens: Sequence[IndexedDataset]
) -> Sequence[IndexedDataset | None]:
    """A reference model's log-probability of each token, for both sides; None without references.

    Raises  DataError if one does not match its token file.
    """
    if prefixes is None:
        return (None, None)
    files = [IndexedDataset(prefix) for prefix in prefixes]
    for file, token_file in zip(files, tokens, strict=True):
        if file.dtype.kind != "f" or not np.array_equal(file.sizes, token_file.sizes):
            raise DataError(
                f"{file.prefix} does not match {token_file.prefix}: a reference needs one float for"
                " each of its tokens"
            )
    return files
