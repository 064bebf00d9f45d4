"""Statistics of a batch for `castalia batches --fn`, and examples of such functions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.stream.opening import Block


def tokens(batch: NDArray[np.int64], step: int) -> dict[str, Any]:
    """How many of a step's ids are distinct, which is the most frequent, how even they are.

    Shapes  batch (rows, tokens + 1).
    Units   entropy of the ids' frequencies, in nats.
    """
    ids, counts = np.unique(batch, return_counts=True)
    shares = counts / counts.sum()
    return {
        "tokens": batch.size,
        "distinct": len(ids),
        "most_frequent": int(ids[counts.argmax()]),
        "entropy": float(-(shares * np.log(shares)).sum()),
    }


def documents(batch: NDArray[np.int64], step: int, block: Block) -> dict[str, Any]:
    """How many pieces of documents a step's rows hold, how long they are, and rows by source.

    Units  length in tokens; `rows_by_source` counts the sources in the order of the config.
    """
    lengths = block.table.lengths
    return {
        "pieces": len(lengths),
        "mean_length": float(lengths.mean()),
        "rows_by_source": np.bincount(block.source),
    }
