"""Bits per byte of held-out text, by source: a measure that tokenizers do not change.

A document is read as [start] + its tokens, cut into windows of `seq_length` that overlap in no target, so that every
token of the document is predicted exactly once, from what stands before it in its own window. The end-of-document
token is context for the next document's start and no target, for it stands for no byte of the text. Without such a
token nothing stands before the first token, and it is charged log2(V) bits.

    bits per byte = sum over tokens of -log2 p(token | window so far) / UTF-8 bytes of the text

Source  Gao et al. 2020, arXiv:2101.00027 (the Pile), section 3.1: L_T / L_B * loss / ln 2.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castalia.core.errors import DataError
from castalia.data.batch import IGNORED
from castalia.data.indexed import IndexedDataset
from castalia.inference.engine import Engine
from castalia.models import Decoder
from castalia.models.cross_entropy import fused_cross_entropy

Ids = NDArray[np.int64]
Window = tuple[Ids, Ids]
"""Inputs and targets, of equal length."""


class HeldOut(NamedTuple):
    """One source's held-out text: the prefix of its token file, and the UTF-8 bytes of each document in it."""

    prefix: str
    document_bytes: Sequence[int]


class SourceBits(NamedTuple):
    """What one source came to: bits per byte, nats per token, and how much text stands behind them."""

    bits_per_byte: float
    loss: float
    tokens: int
    bytes: int


def choose_documents(sizes: Sequence[int], max_tokens: int | None) -> list[int]:
    """Whole documents in their order as long as they fit in `max_tokens`; at least one."""
    if max_tokens is None:
        return list(range(len(sizes)))
    chosen, left = [], max_tokens
    for i, size in enumerate(sizes):
        if size <= left:
            chosen.append(i)
            left -= size
    return chosen or [min(range(len(sizes)), key=lambda i: sizes[i])]


def cut_windows(tokens: Ids, seq_length: int, start_id: int | None) -> list[Window]:
    """One document's windows; the first predicts its first token from `start_id`, if there is one."""
    line = tokens if start_id is None else np.concatenate([np.array([start_id], np.int64), tokens])
    starts = range(0, len(line) - 1, seq_length)
    return [
        (line[at : at + seq_length][: len(line) - 1 - at], line[at + 1 : at + seq_length + 1])
        for at in starts
    ]


def stack(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Windows as tokens and labels (B, T) int64, filled up on the right with targets that do not count."""
    width = max(len(inputs) for inputs, _ in windows)
    tokens = torch.zeros(len(windows), width, dtype=torch.int64)
    labels = torch.full((len(windows), width), IGNORED)
    for row, (inputs, targets) in enumerate(windows):
        tokens[row, : len(inputs)] = torch.from_numpy(inputs)
        labels[row, : len(targets)] = torch.from_numpy(targets)
    return tokens, labels


def batches(windows: Sequence[Window], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of about the same length together, `rows` at a time, so that little is filled up."""
    order = sorted(windows, key=lambda window: len(window[0]))
    for at in range(0, len(order), rows):
        yield stack(order[at : at + rows])


@torch.no_grad()
def sum_of_losses(model: Decoder, windows: Sequence[Window], rows: int) -> float:
    """Negative log-likelihood of all targets, in nats."""
    device = model.head_weight.device
    total = 0.0
    for tokens, labels in batches(windows, rows):
        hidden_NC = model(tokens.to(device)).flatten(0, 1)
        total += float(
            fused_cross_entropy(hidden_NC, model.head_weight, labels.to(device).flatten()).total
        )
    return total


def engine_losses(engine: Engine, windows: Sequence[Window]) -> float:
    """The same by any engine of inference, one window at a time."""
    lines = ([*inputs.tolist(), int(targets[-1])] for inputs, targets in windows)
    return -sum(float(engine.logprobs(line).double().sum()) for line in lines)


def source_bits(
    model: Decoder | Engine,
    source: HeldOut,
    *,
    seq_length: int,
    eod_id: int | None,
    max_tokens: int | None,
    rows: int,
) -> SourceBits:
    """Bits per byte of one source; the arguments are those of `bits_per_byte`."""
    dataset = IndexedDataset(source.prefix)
    if len(dataset) != len(source.document_bytes) or not len(dataset):
        raise DataError(
            f"{source.prefix} holds {len(dataset)} documents, but byte counts are given for"
            f" {len(source.document_bytes)}; both come from the same `prepare`"
        )
    chosen = choose_documents(dataset.sizes.tolist(), max_tokens)
    windows: list[Window] = []
    tokens = uncovered = 0
    for i in chosen:
        ids = dataset[i].astype(np.int64)
        ids = ids[:-1] if len(ids) and ids[-1] == eod_id else ids
        windows += cut_windows(ids, seq_length, eod_id)
        tokens += len(ids)
        uncovered += eod_id is None and len(ids) > 0
    nats = (
        engine_losses(model, windows)
        if isinstance(model, Engine)
        else sum_of_losses(model, windows, rows)
    )
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
) -> dict[str, SourceBits]:
    """Bits per byte of each source's held-out text under `model`, a decoder or an engine of castalia.load.

    Units   seq_length and max_tokens (per source; whole documents, null for all) in tokens, rows in windows a batch.
    Raises  DataError if a token file is broken or its documents and byte counts differ in number.
    """
    if isinstance(model, Decoder):
        model.eval()
    return {
        name: source_bits(
            model, source, seq_length=seq_length, eod_id=eod_id, max_tokens=max_tokens, rows=rows
        )
        for name, source in sources.items()
    }
