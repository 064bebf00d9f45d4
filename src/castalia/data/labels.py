"""Label files, one label for each token, and reward files, one number for each document; as in
GPT-NeoX.

A label is the token itself, or -100 where the token is not a target.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import (
    TOKENS_AT_A_TIME,
    IndexedDataset,
    IndexedDatasetWriter,
    require_tokens,
    without_suffix,
)
from castalia.data.row_source import DocumentSpan
from castalia.data.shards import OnBytes
from castalia.data.sidecar import close_with_record, refuse_inputs, refuse_to_replace

IGNORED = -100
"""Label of a token that is not a target, as in torch and in GPT-NeoX's label files."""
Labels = list[IndexedDataset] | None
"""A label file for each source; None where every token is a target."""


def open_labels(
    paths: Sequence[str],
    datasets: Sequence[IndexedDataset],
    option: str,
    *,
    are_weights: bool = False,
) -> Labels:
    """The label file of each token file, or its file of weights; None if no paths are given.

    Raises  ConfigError if their numbers differ; DataError if a document has different lengths in
            the two.
    """
    if not paths:
        return None
    if len(paths) != len(datasets):
        raise ConfigError(
            f"data.{option} has {len(paths)} label files for {len(datasets)} token files; give one"
            " for each"
        )
    files = [IndexedDataset(path) for path in paths]
    for labels, dataset in zip(files, datasets, strict=True):
        if are_weights:
            require_weights(labels)
        else:
            require_tokens(labels)
        if len(labels) != len(dataset) or (labels.sizes != dataset.sizes).any():
            raise DataError(
                f"{labels.prefix} does not match {dataset.prefix}: a label file needs one label for"
                " each token; make it again"
            )
    return files


def require_weights(weights: IndexedDataset) -> None:
    """Refuse a file whose numbers are no weights.

    Raises  DataError naming the file.
    """
    if weights.dtype.kind != "f":
        raise DataError(
            f"{weights.prefix}: holds {weights.dtype}, expected floats, one weight for each token"
        )


def label_file(labels: Labels, source: int) -> IndexedDataset | None:
    """The label file of one source; None without label files."""
    if labels is None:
        return None
    return labels[source]


def without_targets(labels: IndexedDataset, most: int) -> NDArray[np.bool_]:
    """Which documents have no target among their first `most` labels, (N,)."""
    sizes = labels.sizes.astype(np.int64)
    ends = np.cumsum(sizes)
    width = labels.dtype.itemsize
    without = np.ones(len(labels), np.bool_)
    start = 0
    while start < len(labels):
        # As many documents as make up about TOKENS_AT_A_TIME tokens, at least one.
        before = ends[start] - sizes[start]
        limit = before + TOKENS_AT_A_TIME
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        labels.check_places(start, stop)
        first = labels.pointers[start:stop] // width
        counts = sizes[start:stop]
        base = int(first.min())
        number = int((first + counts).max()) - base
        values = labels.buffer.view(labels.dtype, number, base * width)
        # Targets before each token: two look-ups then count those of a document.
        targets = np.concatenate(([0], np.cumsum(values >= 0)))
        begins = first - base
        without[start:stop] = targets[begins + np.minimum(counts, most)] == targets[begins]
        start = stop
    return without


def label_row(
    labels: IndexedDataset, spans: Sequence[DocumentSpan], length: int
) -> NDArray[np.int64]:
    """The labels of the spans that make up a row, (length,); IGNORED in the padding."""
    row = np.full(length, IGNORED, np.int64)
    filled = 0
    for document, start, count in spans:
        row[filled : filled + count] = labels.get(document, start, count)
        filled += count
    # GPT-NeoX takes every negative label for -100.
    return np.where(row < 0, IGNORED, row)


def weight_row(
    weights: IndexedDataset, spans: Sequence[DocumentSpan], length: int
) -> NDArray[np.float32]:
    """The weights of the spans that make up a row, (length,); 0 in the padding.

    Raises  DataError if one is negative or not finite.
    """
    row = np.zeros(length, np.float32)
    filled = 0
    for document, start, count in spans:
        row[filled : filled + count] = weights.get(document, start, count)
        filled += count
    if not (np.isfinite(row) & (row >= 0)).all():
        raise DataError(f"{weights.prefix}: a weight is negative or not finite; make it again")
    return row


def read_rewards(prefix: str | os.PathLike[str], dataset: IndexedDataset) -> NDArray[np.float32]:
    """The reward of each document of a token file, (N,), from a file with one number per document.

    Raises  DataError naming the document, if the file does not have exactly one finite number for
            each.
    """
    file = IndexedDataset(prefix)
    if len(file) != len(dataset):
        raise DataError(
            f"{file.prefix} has {len(file)} rewards for the {len(dataset)} documents of"
            f" {dataset.prefix}; make it again"
        )
    wrong = np.flatnonzero(file.sizes != 1)
    if len(wrong):
        raise DataError(
            f"{file.prefix}: document {wrong[0]} has {file.sizes[wrong[0]]} numbers, expected one"
            " reward per document"
        )
    rewards = np.fromiter((file[i][0] for i in range(len(file))), np.float32, len(file))
    wrong = np.flatnonzero(~np.isfinite(rewards))
    if len(wrong):
        raise DataError(
            f"{file.prefix}: the reward of document {wrong[0]} is {rewards[wrong[0]]}, expected a"
            " finite number"
        )
    return rewards


def require_both_labels(rewards: Sequence[NDArray[np.float32]]) -> None:
    """Refuse answers that are all desirable, or all undesirable: a model would learn to write
    anything but these, or nothing.

    Raises  DataError.
    """
    labels = np.concatenate([np.sign(values) for values in rewards])
    for label, word in ((1, "desirable"), (-1, "undesirable")):
        if (labels == label).all():
            raise DataError(
                f"all {len(labels)} answers are {word}, so that there is nothing to tell apart;"
                " add answers with the other label, or use loss.kind=next_token"
            )


def mask_before(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pattern: Sequence[int],
    *,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Write a label file whose targets begin after the first `pattern` of each document.

    A document without the pattern keeps all its targets, as in GPT-NeoX. The dtype is int32,
    because -100 does not fit into uint16. Returns the record.
    Raises  ConfigError if the pattern is empty, the output is the input, or it holds token files of
            another job and is not to be overwritten.
    Source  tools/datasets/preprocess_data_with_mask.py of GPT-NeoX.
    """
    if not pattern:
        raise ConfigError("--before needs at least one token id, for instance --before 37,25")
    dataset = IndexedDataset(prefix)
    base = without_suffix(output)
    require_tokens(dataset)
    refuse_inputs(base, [dataset])
    job = {"labels_of": dataset.prefix, "before": list(pattern)}
    refuse_to_replace(base, job, overwrite)
    wanted = np.array(pattern, np.int64)
    masked = 0
    with IndexedDatasetWriter(base, np.int32) as writer:
        for document in range(len(dataset)):
            labels = dataset[document].astype(np.int32)
            end = end_of(labels, wanted)
            labels[:end] = IGNORED
            masked += end
            writer.add(labels)
            if on_bytes:
                on_bytes(int(dataset.sizes[document]) * dataset.dtype.itemsize)
        return close_with_record(writer, base, {**job, "masked": masked})


def end_of(tokens: NDArray[np.int32], pattern: NDArray[np.int64]) -> int:
    """The place after the first `pattern` in a document; 0 without one."""
    if len(tokens) < len(pattern):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    matches = np.flatnonzero((windows == pattern).all(1))
    if not len(matches):
        return 0
    return int(matches[0]) + len(pattern)
