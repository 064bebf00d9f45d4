"""One source cut into rows as data.packing says."""

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset
from castalia.data.labels import label_file, without_targets
from castalia.data.order import NeoxOrder
from castalia.data.order_cache import cache_of
from castalia.data.packed import PackedDataset
from castalia.data.packing_order import PackingOrder
from castalia.data.pairwise import PairOrder, SideRows
from castalia.data.row_source import DocumentSpan, RowSource
from castalia.data.sources import Files
from castalia.data.span_table import SpanTable, bounds_of, runs


class PaddedRows(RowSource[PackingOrder]):
    """Rows of whole documents or best-fit spans, padded where they end early."""

    padded = True

    def spans(self, row: int) -> list[DocumentSpan]:
        """The spans laid into row `row`, and GPT-NeoX's stray token under `neox_exact`."""
        order = self.order
        start, stop = order.starts[row : row + 2].tolist()
        documents = order.documents[start:stop].tolist()
        offsets = order.maps["offsets"][start:stop].tolist()
        lengths = order.maps["lengths"][start:stop].tolist()
        spans = [DocumentSpan(*span) for span in zip(documents, offsets, lengths, strict=True)]
        has_room = sum(lengths) < order.seq_length + 1
        if order.exact and has_room and stop < len(order.documents):
            length = min(1, int(order.maps["lengths"][stop]))
            spans.append(DocumentSpan(int(order.documents[stop]), 0, length))
        return spans

    def spans_of(self, rows: NDArray[np.int64]) -> SpanTable:
        """What `spans` gives for each of (n,) rows."""
        order = self.order
        if order.exact:  # stray tokens, which are for comparisons on small files
            return super().spans_of(rows)
        begins = order.starts[rows]
        counts = order.starts[rows + 1] - begins
        places = runs(begins, counts)
        arrays = (order.documents, order.maps["offsets"], order.maps["lengths"])
        columns = [array[places].astype(np.int64) for array in arrays]
        return SpanTable(bounds_of(counts), *columns)


def cut_into_rows(
    files: Files,
    config: DataConfig,
    *,
    rows: int,
    seed: int,
    documents: range | None = None,
) -> PackedDataset | PaddedRows | SideRows:
    """A source's rows under data.packing, for an order of `rows` rows; 0 means each document once.

    files      those of the one source; of pairs, the rows are those of the preferred answers.
    documents  the documents to use; all by default.
    Raises     DataError naming the source, if it is too short for a row or no document is left.
    """
    dataset = files.tokens[0]
    labels = label_file(files.labels, 0)
    cache = cache_of(dataset.prefix, config.order_cache)
    try:
        if files.rejected is not None:
            sides = (dataset, files.rejected.tokens[0])
            both_labels = (labels, label_file(files.rejected.labels, 0))
            order = PairOrder(sides, both_labels, config, rows, seed, documents, cache)
            return SideRows(dataset, order)
        if config.packing == "packed":
            packed_order = NeoxOrder(
                dataset.sizes,
                seq_length=config.seq_length,
                num_samples=rows,
                seed=seed,
                documents=documents,
                cache=cache,
            )
            return PackedDataset(dataset, packed_order)
        packing_order = PackingOrder(
            dataset.sizes,
            config,
            num_samples=rows,
            seed=seed,
            documents=documents,
            left_out=left_out_by_labels(config, labels),
            cache=cache,
        )
        return PaddedRows(dataset, packing_order)
    except DataError as error:
        raise DataError(f"{where(dataset, config, documents)}: {error}") from None


def left_out_by_labels(
    config: DataConfig, labels: IndexedDataset | None
) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
    """Documents without a target within a row, which `neox_exact` leaves out; None without it."""
    if labels is None or not config.neox_exact:
        return None
    # GPT-NeoX looks at the labels that fit into a row, but counts them differently in the two
    # packings.
    return without_targets(labels, config.seq_length + (config.packing != "unpacked"))


def where(dataset: IndexedDataset, config: DataConfig, documents: range | None) -> str:
    """Name of a source in an error."""
    if documents is None or config.split is None:
        return dataset.prefix
    return (
        f"{dataset.prefix} (documents {documents.start} to {documents.stop} under data.split"
        f" {config.split!r})"
    )
