"""What the rows of a run are checked for before the model takes memory: known ids, and targets."""

from collections.abc import Callable, Iterator

import numpy as np

from castalia.core.errors import DataError
from castalia.data.batch import Batch
from castalia.data.loader import as_batch
from castalia.data.row_source import RowPlaces
from castalia.data.rows_by_source import RowsBySource
from castalia.data.run_rows import RunRows
from castalia.data.served import ServedRows
from castalia.data.step_reader import StepReader
from castalia.data.vocabulary import check_vocab

SCANNED_BYTES = 1 << 30
"""Token files up to this size are searched for ids beyond the vocabulary before the first step,
which takes less than a second; larger ones are checked batch by batch."""
FIRST_ROWS = 2
"""Rows read of each source: a loss of pairs has no weight for a single one."""
MOST_ROWS = 256
"""Rows read at a time, once the first ones had no target."""


def check_rows(rows: RunRows, vocab_size: int, weight: Callable[[Batch], float]) -> None:
    """Check the sources that a run reads; `weight` is the loss's weight of a batch.

    Raises  DataError for an id beyond the vocabulary, or a source without a target.
    """
    # An id beyond the vocabulary would read past the embedding: on a GPU an assert without a
    # place, in the middle of the run.
    for source in rows.train.with_rows():
        for side in rows.train.sides:
            check_vocab(side.row_sources[source].dataset, vocab_size, SCANNED_BYTES)
    # Such a source is read for nothing, under a mixer for ever: no loss moves its share.
    require_targets(rows, weight)


def require_targets(rows: RunRows, weight: Callable[[Batch], float]) -> None:
    """Refuse a source that the run would read for nothing, because no row of it has a target.

    Reads the first rows of each source, and more only where those have none.

    weight  the loss's weight of a batch: a loss may learn from rows that have no labels.
    Raises  DataError naming the first such source.
    """
    for option, served, names in (
        ("data.train", rows.train, rows.sources),
        ("data.valid", rows.valid, rows.valid_sources),
    ):
        if served is None:
            continue
        for source in served.with_rows():
            batches = batches_of(rows, served, source)
            if any(batch.targets or weight(batch) for batch in batches):
                continue
            rows_of_source = served.row_sources[source]
            raise DataError(
                f"{option}: none of the {len(rows_of_source.order.shuffle_idx):,} rows of source"
                f" {names[source]!r} ({rows_of_source.dataset.prefix}) has a target, so nothing can"
                f" be learned from it: {reason(rows, served, source)}; remove the source, or give"
                " it weight 0 if there are others"
            )


def batches_of(rows: RunRows, served: ServedRows, source: int) -> Iterator[Batch]:
    """The rows of one source as the loader serves them, in growing batches."""
    # A reader of this source alone: a batch looks at every source of its reader.
    alone = RowsBySource([served.row_sources[source]])
    if served.files is not None:
        alone.attach(served.files.of(source))
    reader = StepReader(alone, 1, 1, 0, 1, mask=rows.mask)
    count = int(alone.sizes[0])
    first = 0
    size = FIRST_ROWS
    while first < count:
        index = range(first, min(first + size, count))
        places = RowPlaces(np.zeros(len(index), np.int64), np.array(index))
        micro_rows = reader.micro_batch(index, places, reader.look_up(places))
        yield as_batch(micro_rows, rows.eod_id)
        first = index.stop
        size = min(2 * size, MOST_ROWS)


def reason(rows: RunRows, served: ServedRows, source: int) -> str:
    """What leaves the rows of a source without a target."""
    if served.labels is not None:
        return f"every label in {served.labels[source].prefix} that fits into a row is -100"
    if rows.eod_id is not None:
        return "data.eod_mask_loss leaves out the target after each end-of-document token"
    return "a document of one token has no next token to predict"
