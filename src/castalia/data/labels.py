"""Label files: one beside each token file, of the same lengths, -100 where a token is no target; reward files, of one
number a document. As in GPT-NeoX."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import (
    PIECE_TOKENS,
    IndexedDataset,
    IndexedDatasetWriter,
    require_tokens,
    without_suffix,
)
from castalia.data.mapped import view
from castalia.data.packed import Span
from castalia.data.shards import OnBytes
from castalia.data.sidecar import finish, refuse_inputs

IGNORED = -100
"""Label of a token that is not a target, as in torch and in GPT-NeoX's label files."""


def open_labels(
    paths: Sequence[str], datasets: Sequence[IndexedDataset], option: str
) -> list[IndexedDataset] | None:
    """The label file of each token file; None without any.

    Raises  ConfigError if there is not one a token file; DataError if a document has other lengths in the two.
    """
    if not paths:
        return None
    if len(paths) != len(datasets):
        raise ConfigError(
            f"data.{option} has {len(paths)} label files for {len(datasets)} token files; give one each"
        )
    found = [IndexedDataset(path) for path in paths]
    for labels, dataset in zip(found, datasets, strict=True):
        require_tokens(labels)
        if len(labels) != len(dataset) or (labels.sizes != dataset.sizes).any():
            raise DataError(
                f"{labels.prefix} does not fit {dataset.prefix}: a label file has a label for each token; make it again"
            )
    return found


def without_targets(labels: IndexedDataset, most: int) -> NDArray[np.bool_]:
    """Which documents have no target among their first `most` labels, (N,)."""
    sizes, width = labels.sizes.astype(np.int64), labels.dtype.itemsize
    ends, found = np.cumsum(sizes), np.ones(len(labels), np.bool_)
    start = 0
    while start < len(labels):
        done = ends[start] - sizes[start]
        stop = max(start + 1, int(np.searchsorted(ends, done + PIECE_TOKENS, side="right")))
        labels.check_places(start, stop)
        first = labels.pointers[start:stop] // width
        base, counts = int(first.min()), sizes[start:stop]
        tokens = view(labels.buffer, labels.dtype, int((first + counts).max()) - base, base * width)
        targets = np.concatenate(([0], np.cumsum(tokens >= 0)))
        found[start:stop] = (
            targets[first - base + np.minimum(counts, most)] == targets[first - base]
        )
        start = stop
    return found


def label_row(labels: IndexedDataset, pieces: Sequence[Span], length: int) -> NDArray[np.int64]:
    """The labels of the stretches that make up a row, (length,); IGNORED after the last."""
    row, filled = np.full(length, IGNORED, np.int64), 0
    for document, start, count in pieces:
        row[filled : filled + count] = labels.get(document, start, count)
        filled += count
    return np.where(row < 0, IGNORED, row)


def read_rewards(prefix: str | os.PathLike[str], dataset: IndexedDataset) -> NDArray[np.float32]:
    """The reward of each document of a token file, (N,), out of a file with one number a document.

    Raises  DataError naming the document if there is not one number for each, or one is not finite.
    """
    file = IndexedDataset(prefix)
    if len(file) != len(dataset):
        raise DataError(
            f"{file.prefix} has {len(file)} rewards for the {len(dataset)} documents of {dataset.prefix}; make it again"
        )
    if len(wrong := np.flatnonzero(file.sizes != 1)):
        count = file.sizes[wrong[0]]
        raise DataError(
            f"{file.prefix}: document {wrong[0]} has {count} numbers, expected one reward a document"
        )
    found = np.fromiter((file[i][0] for i in range(len(file))), np.float32, len(file))
    if len(wrong := np.flatnonzero(~np.isfinite(found))):
        raise DataError(
            f"{file.prefix}: the reward of document {wrong[0]} is {found[wrong[0]]}, not a finite number"
        )
    return found


def mask_before(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pattern: Sequence[int],
    *,
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Write the label file of a token file in which all up to the end of the first `pattern` is no target.

    A document without the pattern keeps all its targets, as in GPT-NeoX. int32, for -100 has no place in u16.
    Raises  ConfigError for an empty pattern or if the output is the input.
    Source  tools/datasets/preprocess_data_with_mask.py of GPT-NeoX.
    """
    if not pattern:
        raise ConfigError("--before: name at least one token id, for instance --before 37,25")
    dataset, base = IndexedDataset(prefix), without_suffix(output)
    require_tokens(dataset)
    refuse_inputs(base, [dataset])
    wanted, masked = np.array(pattern, np.int64), 0
    with IndexedDatasetWriter(base, np.int32) as writer:
        for document in range(len(dataset)):
            labels = dataset[document].astype(np.int32)
            end = end_of(labels, wanted)
            labels[:end] = IGNORED
            masked += end
            writer.add(labels)
            if on_bytes:
                on_bytes(int(dataset.sizes[document]) * dataset.dtype.itemsize)
        return finish(
            writer, base, {"labels_of": dataset.prefix, "before": list(pattern), "masked": masked}
        )


def end_of(tokens: NDArray[np.int32], pattern: NDArray[np.int64]) -> int:
    """Where the first `pattern` ends in a document, 0 if it has none."""
    if len(tokens) < len(pattern):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    places = np.flatnonzero((windows == pattern).all(1))
    return int(places[0]) + len(pattern) if len(places) else 0
