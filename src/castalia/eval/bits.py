"""Bits per byte of held-out text by source, a measure independent of the tokenizer.

    bits per byte = sum over tokens of -log2 p(token | window so far) / UTF-8 bytes of the text

A document is read as [start] + its tokens. It is cut into windows of `seq_length` whose targets do
not overlap, so that every token is predicted exactly once, from the tokens before it in its window.
The end-of-document token serves as the start of the next document. It is never a target, because it
stands for no byte of the text. Without such a token the first token of a document has no context
and is charged log2(V) bits.

Source  Gao et al. 2020, arXiv:2101.00027 (the Pile), section 3.1: L_T / L_B * loss / ln 2.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.batch import IGNORED
from castalia.data.indexed import IndexedDataset
from castalia.data.sidecar import recorded_end
from castalia.eval.likelihoods.readers import follows_length
from castalia.eval.likelihoods.scoring import Line, score_lines
from castalia.eval.losses import TokensAndLabels, sum_of_losses
from castalia.eval.shares import ALONE, Share
from castalia.inference.engine import Engine
from castalia.models import Decoder

Ids = NDArray[np.int64]
Window = tuple[Ids, Ids]
"""Inputs and targets, of equal length."""


class HeldOut(NamedTuple):
    """One source's held-out text."""

    prefix: str
    """Prefix of its token file."""
    document_bytes: Sequence[int]
    """UTF-8 bytes of each document in it."""


class SourceBits(NamedTuple):
    """Result for one source."""

    bits_per_byte: float
    loss: float
    """Nats a token."""
    tokens: int
    bytes: int


def choose_documents(
    sizes: Sequence[int], max_tokens: int | None, max_documents: int | None = None
) -> list[int]:
    """Places of whole documents, in order, that fit in `max_tokens` together; at least one.

    Only the first `max_documents` are considered.
    """
    sizes = sizes[:max_documents]
    if max_tokens is None:
        return list(range(len(sizes)))
    chosen: list[int] = []
    # A document that does not fit is passed over; a later, shorter one may still fit.
    left = max_tokens
    for i, size in enumerate(sizes):
        if size <= left:
            chosen.append(i)
            left -= size
    if not chosen:
        chosen = [min(range(len(sizes)), key=lambda i: sizes[i])]
    return chosen


def cut_windows(tokens: Ids, seq_length: int, start_id: int | None) -> list[Window]:
    """Windows of one document; its first token is predicted from `start_id`, if given."""
    line = tokens
    if start_id is not None:
        line = np.concatenate([np.array([start_id], np.int64), tokens])
    windows: list[Window] = []
    for at in range(0, len(line) - 1, seq_length):
        targets = line[at + 1 : at + seq_length + 1]
        windows.append((line[at : at + len(targets)], targets))
    return windows


def stack(windows: Sequence[Window]) -> TokensAndLabels:
    """Stack windows into tokens and labels (B, T), padded on the right with ignored labels."""
    width = max(len(inputs) for inputs, _ in windows)
    tokens = torch.zeros(len(windows), width, dtype=torch.int64)
    labels = torch.full((len(windows), width), IGNORED)
    for row, (inputs, targets) in enumerate(windows):
        tokens[row, : len(inputs)] = torch.from_numpy(inputs)
        labels[row, : len(targets)] = torch.from_numpy(targets)
    return tokens, labels


def batches(
    windows: Sequence[Window], rows: int, *, one_length: bool = False
) -> list[list[Window]]:
    """Batches of `rows` windows, sorted by length to keep padding small; without any if padding
    changes the logits."""

    def length(window: Window) -> int:
        return len(window[0])

    order = sorted(windows, key=length)
    if one_length:
        alike = [list(group) for _, group in groupby(order, length)]
    else:
        alike = [order]
    return [group[at : at + rows] for group in alike for at in range(0, len(group), rows)]


def engine_losses(engine: Engine, windows: Sequence[Window]) -> float:
    """Negative log-likelihood of all targets of a batch under an inference engine, in nats."""
    lines = [Line((int(inputs[0]),), tuple(targets.tolist())) for inputs, targets in windows]
    return -math.fsum(one.logprob for one in score_lines(engine, lines, rows=len(lines)))


def shared_losses(
    model: Decoder | Engine, windows: Sequence[Window], rows: int, share: Share
) -> float:
    """Negative log-likelihood of all targets in nats; each rank reads its share of the batches.

    The sum is in one order, so that it is the same number on any number of ranks.
    """

    def losses(own: list[list[Window]]) -> list[float]:
        if isinstance(model, Engine):
            return [engine_losses(model, batch) for batch in own]
        return [sum_of_losses(model, [stack(batch)]) for batch in own]

    def tokens_in(batch: list[Window]) -> int:
        return sum(len(inputs) for inputs, _ in batch)

    # An engine's lines take care of it by themselves.
    one_length = isinstance(model, Decoder) and follows_length(model)
    items = batches(windows, rows, one_length=one_length)
    parts: list[float] = share.compute(items, losses, together=id, cost=tokens_in)
    return math.fsum(parts)


def source_bits(
    model: Decoder | Engine,
    source: HeldOut,
    *,
    seq_length: int,
    eod_id: int | None,
    max_tokens: int | None,
    rows: int,
    max_documents: int | None = None,
    share: Share = ALONE,
) -> SourceBits:
    """Bits per byte of one source; arguments and errors as in `bits_per_byte`."""
    dataset = IndexedDataset(source.prefix)
    if len(dataset) != len(source.document_bytes) or not len(dataset):
        raise DataError(
            f"{source.prefix} holds {len(dataset)} documents, but byte counts are given for"
            f" {len(source.document_bytes)}; take both from the same `castalia prepare`"
        )
    # `prepare --eod` may have ended the documents with another token than the model's.
    end_id = recorded_end([source.prefix])
    if end_id is None:
        end_id = eod_id
    chosen = choose_documents(dataset.sizes.tolist(), max_tokens, max_documents)
    windows: list[Window] = []
    tokens = 0
    uncovered = 0
    for i in chosen:
        ids = dataset[i].astype(np.int64)
        if len(ids) and ids[-1] == end_id:
            ids = ids[:-1]
        windows += cut_windows(ids, seq_length, eod_id)
        tokens += len(ids)
        # Without a start token, the first token of a document is not a target of any window.
        if eod_id is None and len(ids):
            uncovered += 1
    nats = shared_losses(model, windows, rows, share)
    nats += uncovered * math.log(model.config.padded_vocab_size)
    size = sum(source.document_bytes[i] for i in chosen)
    return SourceBits(nats / math.log(2) / max(1, size), nats / max(1, tokens), tokens, size)


def bits_per_byte(
    model: Decoder | Engine,
    sources: Mapping[str, HeldOut],
    *,
    seq_length: int,
    eod_id: int | None,
    max_tokens: int | None = None,
    rows: int = 16,
    share: Share = ALONE,
) -> dict[str, SourceBits]:
    """Bits per byte of each source's held-out text under a model or an engine of `castalia.load`.

    seq_length  tokens in a window.
    max_tokens  limit for each source in tokens, taken as whole documents; None for all.
    rows        windows in a batch.
    share       this rank's share of the work; every rank gets all numbers.
    Raises      DataError if a token file is damaged, or its documents and byte counts differ in
                number.
    """
    results: dict[str, SourceBits] = {}
    for name, source in sources.items():
        results[name] = source_bits(
            model,
            source,
            seq_length=seq_length,
            eod_id=eod_id,
            max_tokens=max_tokens,
            rows=rows,
            share=share,
        )
    return results
