"""Token files put together and taken apart, by whole documents: merge, and split by shares or into parts."""

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
    PIECE_TOKENS,
    IndexedDataset,
    IndexedDatasetWriter,
    without_suffix,
)
from castalia.data.mapped import view
from castalia.data.order import split_documents
from castalia.data.shards import OnBytes
from castalia.data.sidecar import finish, read_record, refuse_inputs, tokenizer_facts

PIECE_DOCUMENTS = 1 << 14


def merge(
    prefixes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """All documents of several token files, in the order of the inputs, as one; returns its record.

    The indexes of documents go along if every input has one, rejected documents if any has. doc_idx goes on where the
    input before ended, which GPT-NeoX's merge_datasets.py leaves out.
    Raises  DataError if the inputs' dtypes or tokenizers differ, or shares of a job lack one or are not in order;
            ConfigError if the output is an input.
    """
    datasets = [IndexedDataset(prefix) for prefix in several(prefixes)]
    if not datasets:
        raise ConfigError("nothing to merge: name at least one PREFIX")
    for dataset in datasets[1:]:
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype}, but {datasets[0].prefix} holds {datasets[0].dtype};"
                " merge takes files of one dtype: prepare both with the same tokenizer"
            )
    prefix = without_suffix(output)
    refuse_inputs(prefix, datasets)
    facts = tokenizer_facts(datasets) | require_all_shares(datasets)
    boundaries: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    with IndexedDatasetWriter(prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            boundaries.append(doc_idx_of(dataset)[1:] + len(writer.sizes))
            copy_documents(dataset, writer, 0, len(dataset), on_bytes)
        writer.doc_idx = np.concatenate(boundaries)
        merged = [
            {"prefix": d.prefix, "documents": len(d), "tokens": int(d.sizes.sum(dtype="i8"))}
            for d in datasets
        ]
        write_side_files(prefix, [dataset.prefix for dataset in datasets])
        return finish(writer, prefix, {**facts, "merged": merged})


def require_all_shares(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Shares of a job that `prepare` cut are all there, of the same inputs and in order, which a pattern does not give
    from ten on; returns what they say of the whole.

    Raises  DataError naming what is not in its place.
    """
    records = [read_record(dataset.prefix) or {} for dataset in datasets]
    due, count, cut_of = 0, 1, None
    for dataset, record in zip(datasets, records, strict=True):
        share, whole = share_of(record)
        if share != due or (due and whole != count):
            wanted = f"{due}/{count if due else whole}"
            raise DataError(
                f"{dataset.prefix} is share {share}/{whole} where share {wanted} must come; name all shares of a job,"
                " in their order"
            )
        if due and sizes_of_inputs(record) != cut_of:
            raise DataError(
                f"{dataset.prefix}: share {share}/{whole} was cut of other inputs than the one before it"
            )
        due, count, cut_of = (due + 1) % whole, whole, sizes_of_inputs(record)
    if due:
        raise DataError(
            f"share {due}/{count} is missing after {datasets[-1].prefix}; name all shares of a job"
        )
    uneven = [record["uneven"] for record in records if isinstance(record.get("uneven"), int)]
    return {"uneven": sum(uneven)} if any(uneven) else {}


def share_of(record: dict[str, Any]) -> tuple[int, int]:
    """The share of a job, from 0, and of how many, that a record says its token file is; 0/1 is the whole."""
    match record.get("shard"):
        case [int(share), int(count)] if 0 <= share < count:
            return share, count
    return 0, 1


def sizes_of_inputs(record: dict[str, Any]) -> list[Any]:
    """Bytes of each input that a record names."""
    inputs = record.get("inputs")
    return (
        [one.get("bytes") for one in inputs if isinstance(one, dict)]
        if isinstance(inputs, list)
        else []
    )


def write_side_files(prefix: str, inputs: Sequence[str]) -> None:
    """The index of documents and the rejects of several token files as one, beside the merged file."""
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
    """The index of some documents of a token file, if it has one, beside their own file."""
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
    on_bytes: OnBytes | None = None,
) -> list[dict[str, Any]]:
    """Documents of one token file as several; returns their records.

    `shares` such as `969, 30, 1` writes OUTPUT-train, -valid, -test under the rule of data.split, those without a
    document left out; `parts` writes OUTPUT-part0 … of nearly as many documents each.
    Raises  ConfigError about shares, parts or an output that is the input.
    """
    dataset, base = IndexedDataset(prefix), without_suffix(output)
    chosen = {
        name: found for name, found in stretches(len(dataset), shares, parts).items() if len(found)
    }
    for name in chosen:
        refuse_inputs(f"{base}-{name}", [dataset])
    facts, all_boundaries, records = tokenizer_facts([dataset]), doc_idx_of(dataset), []
    for name, documents in chosen.items():
        with IndexedDatasetWriter(f"{base}-{name}", dataset.dtype) as writer:
            copy_documents(dataset, writer, documents.start, documents.stop, on_bytes)
            inner = all_boundaries[
                (all_boundaries > documents.start) & (all_boundaries < documents.stop)
            ]
            writer.doc_idx = np.concatenate(
                ([0], inner - documents.start, [len(documents)])
            ).astype(np.int64)
            slice_side_file(dataset.prefix, documents, f"{base}-{name}")
            source = {"prefix": dataset.prefix, "first": documents.start, "stop": documents.stop}
            records.append(finish(writer, f"{base}-{name}", {**facts, "split_from": source}))
    return records


def stretches(documents: int, shares: str | None, parts: int | None) -> dict[str, range]:
    """Which documents each output gets, by its name."""
    if (shares is None) == (parts is None):
        raise ConfigError("say how to split: --shares '969, 30, 1' or --parts N, one of them")
    if shares is not None:
        return dict(
            zip(("train", "valid", "test"), split_documents(shares, documents), strict=True)
        )
    if parts is None or not 1 <= parts <= documents:
        raise ConfigError(f"--parts {parts}: expected 1 to {documents}, the number of documents")
    width = len(str(parts - 1))
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
    """Append documents [first, stop); those that lie back to back go a few MiB at a time."""
    width = dataset.dtype.itemsize
    while first < stop:
        end = min(stop, first + PIECE_DOCUMENTS)
        dataset.check_places(first, end)
        sizes = dataset.sizes[first:end].astype(np.int64)
        ends = np.cumsum(sizes)
        expected = dataset.pointers[first] + (ends - sizes) * width
        gaps = np.flatnonzero(dataset.pointers[first : first + len(sizes)] != expected)
        fitting = int(np.searchsorted(ends, PIECE_TOKENS, side="right"))
        count = max(1, min(fitting, int(gaps[0]) if len(gaps) else len(sizes)))
        tokens = view(
            dataset.buffer, dataset.dtype, int(ends[count - 1]), int(dataset.pointers[first])
        )
        writer.add_many(tokens, sizes[:count])
        if on_bytes:
            on_bytes(tokens.nbytes)
        first += count


def doc_idx_of(dataset: IndexedDataset) -> NDArray[np.int64]:
    """The document boundaries; one document a sequence, with a warning, where those of the file are wrong."""
    if boundaries_fit(dataset):
        return dataset.doc_idx
    warnings.warn(
        f"{dataset.idx_path}: its doc_idx does not lead from 0 to {len(dataset)}, as in files that GPT-NeoX merged;"
        " each sequence counts as a document",
        stacklevel=2,
    )
    return np.arange(len(dataset) + 1, dtype=np.int64)


def boundaries_fit(dataset: IndexedDataset) -> bool:
    """Whether doc_idx leads from 0 to the number of sequences without going back."""
    found = dataset.doc_idx
    return bool(
        len(found)
        and found[0] == 0
        and found[-1] == len(dataset)
        and (found[1:] >= found[:-1]).all()
    )
