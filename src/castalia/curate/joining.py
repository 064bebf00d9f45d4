"""Token files merged and split, always by whole documents."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, several
from castalia.corpus.provenance import REJECTS, SUFFIX, join_indexes, slice_index
from castalia.data.indexed import (
    TOKENS_AT_A_TIME,
    IndexedDataset,
    IndexedDatasetWriter,
    without_suffix,
)
from castalia.data.order import split_documents
from castalia.data.shards import OnBytes
from castalia.data.sidecar import (
    close_with_record,
    read_record,
    refuse_inputs,
    refuse_to_replace,
    tokenizer_facts,
)

CHUNK_DOCUMENTS = 1 << 14
"""Documents copied at a time, at most; short ones are copied back to back in one write."""


def merge(
    prefixes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Join token files into one, in the order of the inputs; returns its record.

    The document index is merged if every input has one, the rejects if any has. doc_idx continues
    across inputs, which GPT-NeoX's merge_datasets.py forgets.
    Raises  DataError if dtypes or tokenizers differ, or if the shares of one `prepare` are
            incomplete or out of order; ConfigError if the output is an input, or holds token files
            of another job and is not to be overwritten.
    """
    datasets = [IndexedDataset(prefix) for prefix in several(prefixes)]
    if not datasets:
        raise ConfigError("nothing to merge; name at least one PREFIX")
    for dataset in datasets[1:]:
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype}, but {datasets[0].prefix} holds"
                f" {datasets[0].dtype}; prepare both with the same tokenizer to merge them"
            )
    prefix = without_suffix(output)
    refuse_inputs(prefix, datasets)
    facts = tokenizer_facts(datasets) | require_all_shares(datasets)
    merged = {"merged": input_facts(datasets)}
    refuse_to_replace(prefix, merged, overwrite)
    boundaries: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    with IndexedDatasetWriter(prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            boundaries.append(doc_idx_of(dataset)[1:] + len(writer.sizes))
            copy_documents(dataset, writer, 0, len(dataset), on_bytes)
        writer.doc_idx = np.concatenate(boundaries)
        # Written before the record: a record promises that all files of a prefix are there.
        write_side_files(prefix, [dataset.prefix for dataset in datasets])
        return close_with_record(writer, prefix, {**facts, **merged}, (SUFFIX, REJECTS))


def input_facts(datasets: Sequence[IndexedDataset]) -> list[dict[str, Any]]:
    """Prefix, documents and tokens of each input, for the record of an output."""
    return [
        {
            "prefix": dataset.prefix,
            "documents": len(dataset),
            "tokens": int(dataset.sizes.sum(dtype="i8")),
        }
        for dataset in datasets
    ]


def require_all_shares(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Require all shares of a `prepare --shard`, in order and cut from the same inputs.

    A shell pattern puts share 10 before share 2, and a task of a cluster may have failed: both
    would silently change the corpus. Whole files may stand before, between and after complete
    sets of shares. Returns the facts of the whole that the shares' records sum up to.
    Raises  DataError naming the share that is missing or misplaced.
    """
    records = [read_record(dataset.prefix) or {} for dataset in datasets]
    next_share = 0
    count = 1
    input_sizes: list[Any] = []
    for dataset, record in zip(datasets, records, strict=True):
        share, share_count = share_of(record)
        # Inside a set (next_share > 0) the number of shares must stay the same.
        if share != next_share or (next_share and share_count != count):
            expected_count = count if next_share else share_count
            raise DataError(
                f"{dataset.prefix} is share {share}/{share_count}, expected share"
                f" {next_share}/{expected_count}; name all shares of a corpus, in order"
            )
        if next_share and sizes_of_inputs(record) != input_sizes:
            raise DataError(
                f"{dataset.prefix}: share {share}/{share_count} was prepared from other inputs than"
                " the share before it; prepare all shares from the same files"
            )
        next_share = (next_share + 1) % share_count
        count = share_count
        input_sizes = sizes_of_inputs(record)
    if next_share:
        raise DataError(
            f"share {next_share}/{count} is missing after {datasets[-1].prefix}; name all shares of"
            " a corpus, in order"
        )
    uneven = [record["uneven"] for record in records if isinstance(record.get("uneven"), int)]
    return {"uneven": sum(uneven)} if any(uneven) else {}


def share_of(record: dict[str, Any]) -> tuple[int, int]:
    """Index (from 0) and number of shares in the record of a token file; (0, 1) is a whole one."""
    match record.get("shard"):
        case [int(share), int(count)] if 0 <= share < count:
            return share, count
    return 0, 1


def sizes_of_inputs(record: dict[str, Any]) -> list[Any]:
    """Sizes in bytes of the inputs that a record names."""
    inputs = record.get("inputs")
    if not isinstance(inputs, list):
        return []
    return [entry.get("bytes") for entry in inputs if isinstance(entry, dict)]


def write_side_files(prefix: str, inputs: Sequence[str]) -> None:
    """Merge the document indexes and the rejects of several token files.

    Those of an older output at `prefix` are removed where the inputs have none.
    """
    indexes = [Path(name + SUFFIX) for name in inputs]
    target = Path(prefix + SUFFIX)
    if all(path.exists() for path in indexes):
        with atomic_write(target, "wb") as file:
            join_indexes(indexes, file)
    else:
        target.unlink(missing_ok=True)
    rejects = [Path(name + REJECTS) for name in inputs if Path(name + REJECTS).exists()]
    if rejects:
        with atomic_write(prefix + REJECTS) as out:
            out.writelines(path.read_text(encoding="utf-8") for path in rejects)
    else:
        Path(prefix + REJECTS).unlink(missing_ok=True)


def slice_side_file(prefix: str, documents: range, output: str) -> None:
    """Write the document index of a range of documents beside their token file, if there is one."""
    if not Path(prefix + SUFFIX).exists():
        Path(output + SUFFIX).unlink(missing_ok=True)
        return
    with atomic_write(output + SUFFIX, "wb") as file:
        slice_index(Path(prefix + SUFFIX), documents, file)


def split(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    shares: str | None = None,
    parts: int | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
) -> list[dict[str, Any]]:
    """Split the documents of one token file; returns the records of the outputs.

    `shares`, such as `969, 30, 1`, writes OUTPUT-train, -valid and -test by the rule of data.split;
    splits without a document are not written. `parts` writes OUTPUT-part0 … of nearly equal
    numbers of documents.
    Raises  ConfigError about `shares`, `parts`, or an output that is the input, or that holds token
            files of another job and is not to be overwritten.
    """
    dataset = IndexedDataset(prefix)
    base = without_suffix(output)
    splits = {
        name: documents
        for name, documents in document_ranges(len(dataset), shares, parts).items()
        if len(documents)
    }
    # All outputs are checked before the first is written.
    origins = {}
    for name, documents in splits.items():
        target = f"{base}-{name}"
        refuse_inputs(target, [dataset])
        origin = {"prefix": dataset.prefix, "first": documents.start, "stop": documents.stop}
        origins[name] = {"split_from": origin}
        refuse_to_replace(target, origins[name], overwrite)
    facts = tokenizer_facts([dataset])
    boundaries = doc_idx_of(dataset)
    records = []
    for name, documents in splits.items():
        target = f"{base}-{name}"
        with IndexedDatasetWriter(target, dataset.dtype) as writer:
            copy_documents(dataset, writer, documents.start, documents.stop, on_bytes)
            writer.doc_idx = doc_idx_within(boundaries, documents)
            slice_side_file(dataset.prefix, documents, target)
            origin = {**facts, **origins[name]}
            records.append(close_with_record(writer, target, origin, [SUFFIX]))
    return records


def doc_idx_within(boundaries: NDArray[np.int64], documents: range) -> NDArray[np.int64]:
    """The doc_idx of a range of sequences; a document cut by the range ends there."""
    inner = boundaries[(boundaries > documents.start) & (boundaries < documents.stop)]
    return np.concatenate(([0], inner - documents.start, [len(documents)])).astype(np.int64)


def document_ranges(documents: int, shares: str | None, parts: int | None) -> dict[str, range]:
    """The documents of each output, by its name."""
    if (shares is None) == (parts is None):
        raise ConfigError("choose how to split: either --shares '969, 30, 1' or --parts N")
    if shares is not None:
        ranges = split_documents(shares, documents)
        return dict(zip(("train", "valid", "test"), ranges, strict=True))
    if parts is None or not 1 <= parts <= documents:
        raise ConfigError(
            f"--parts {parts}: expected 1 to {documents}, the number of documents in the file"
        )
    width = len(str(parts - 1))  # zero-padded, so that names sort in order
    return {
        f"part{i:0{width}}": range(documents * i // parts, documents * (i + 1) // parts)
        for i in range(parts)
    }


def copy_documents(
    dataset: IndexedDataset,
    writer: IndexedDatasetWriter,
    first: int,
    stop: int,
    on_bytes: OnBytes | None = None,
) -> None:
    """Append documents [first, stop) to `writer`.

    Documents that lie back to back are copied together, TOKENS_AT_A_TIME tokens at a time: one
    write for each document would be limited by calls, not by the disk.
    """
    width = dataset.dtype.itemsize
    while first < stop:
        end = min(stop, first + CHUNK_DOCUMENTS)
        dataset.check_places(first, end)
        sizes = dataset.sizes[first:end].astype(np.int64)
        ends = np.cumsum(sizes)
        # The run of documents that starts here ends at the first gap or at the token limit.
        expected = dataset.pointers[first] + (ends - sizes) * width
        gaps = np.flatnonzero(dataset.pointers[first : first + len(sizes)] != expected)
        contiguous = int(gaps[0]) if len(gaps) else len(sizes)
        fitting = int(np.searchsorted(ends, TOKENS_AT_A_TIME, side="right"))
        count = max(1, min(fitting, contiguous))
        tokens = dataset.buffer.view(
            dataset.dtype, int(ends[count - 1]), int(dataset.pointers[first])
        )
        writer.add_many(tokens, sizes[:count])
        if on_bytes:
            on_bytes(tokens.nbytes)
        first += count


def doc_idx_of(dataset: IndexedDataset) -> NDArray[np.int64]:
    """The document boundaries; if those of the file are wrong, one document for each sequence.

    Warns in the latter case.
    """
    if boundaries_fit(dataset):
        return dataset.doc_idx
    warnings.warn(
        f"{dataset.idx_path}: doc_idx does not run from 0 to {len(dataset)}, as in files merged by"
        " GPT-NeoX; each sequence is taken for one document",
        stacklevel=2,
    )
    return np.arange(len(dataset) + 1, dtype=np.int64)


def boundaries_fit(dataset: IndexedDataset) -> bool:
    """Whether doc_idx runs from 0 to the number of sequences and never decreases."""
    doc_idx = dataset.doc_idx
    if not len(doc_idx) or doc_idx[0] != 0 or doc_idx[-1] != len(dataset):
        return False
    return bool((doc_idx[1:] >= doc_idx[:-1]).all())
