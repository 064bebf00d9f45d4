"""The rows of a run: every source's order, blended, as one sequence that steps take from."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.blending import blend_maps
from castalia.data.config import DataConfig
from castalia.data.fingerprint import bin_hash, fingerprint
from castalia.data.indexed import CHECK_PIECE, IndexedDataset
from castalia.data.labels import open_labels
from castalia.data.mapped import view
from castalia.data.order import NeoxOrder, rows_per_source, split_documents
from castalia.data.order_cache import Maps, OrderCache, cache_of
from castalia.data.packed import PackedDataset, Span
from castalia.data.packing_order import PaddedRows, piece_rows
from castalia.data.ready_rows import FileOrder, Pack, ReadyRows
from castalia.data.rows_by_source import RowsBySource, rows_by_source
from castalia.data.segments import DocumentMask
from castalia.data.sidecar import require_tokenizer, tokenizer_facts
from castalia.data.tokenizer import load_tokenizer

Labels = list[IndexedDataset] | None
"""A label file for each source; None where every token is a target."""
ORDERS = {"neox": "neox packed", "file": "rows as in the file"}
"""How the fingerprint names an order."""


class BlendedRows:
    """Rows of one or several sources in served order, without an end.

    `rows[p]` is (row (seq_length + 1,) int64, source, p): source is the place in `packs`. Beyond its end a blend
    serves place p modulo its size, and a source place i modulo its rows less one, as GPT-NeoX does; a file of ready
    rows begins again after its last. `size` of a blend is that of all sources unless given.
    """

    def __init__(
        self,
        packs: list[Pack],
        weights: list[float] | None = None,
        places: int = 0,
        size: int | None = None,
        cache: OrderCache | None = None,
    ) -> None:
        self.row_sources = packs
        self.labels: list[IndexedDataset] | None = None
        self.size = len(packs[0].order.shuffle_idx)
        self.period: int | None = None
        self.turns: Maps | None = None
        if weights is not None:
            self.size = self.period = size or sum(len(pack) for pack in packs) or places
        if weights is not None and len(packs) > 1:
            self.turns = blend_maps(weights, min(self.size, places), cache)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int, int]:
        source, place = self.locate(index)
        return self.row_sources[source][place], source, int(index)

    def locate(self, index: int) -> tuple[int, int]:
        """The source of the row served at place `index` >= 0, and its place in that source's order."""
        if index < 0:
            raise IndexError(f"place {index}: places count from 0")
        place = int(index) % self.period if self.period else int(index)
        if self.turns is None:
            return 0, self.row_sources[0].order.wrap(place)
        picks, numbers = self.turns["dataset_index"], self.turns["sample_index"]
        if place >= len(picks):
            raise IndexError(f"place {index}: the blend was built for {len(picks)} places")
        source = int(picks[place])
        return source, self.row_sources[source].order.wrap(int(numbers[place]))

    def documents_of(self, index: int) -> tuple[int, list[Span]]:
        """The source of the row served at place `index`, and the stretches of its documents in the row."""
        source, place = self.locate(index)
        return source, self.row_sources[source].documents_of(place)

    @property
    def seq_length(self) -> int:
        """Tokens in a row that the model sees."""
        return self.row_sources[0].order.seq_length


@dataclass(frozen=True)
class RunRows:
    """What `build_rows` made out of a data config.

    `sources` names the train sources and `valid_sources` those of `valid`; `epochs` and `tokens` are one number each:
    passes over the source's documents that its order holds, and tokens in one pass; `weights` are shares that sum to 1;
    `eod_id` is the id after which no target counts, None unless data.eod_mask_loss is set; `mask` tells the documents
    of a row apart, None unless data.document_mask is set.
    """

    train: BlendedRows | RowsBySource
    valid: BlendedRows | None
    fingerprint: dict[str, Any]
    sources: list[str]
    weights: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    eod_id: int | None = None
    valid_sources: list[str] = field(default_factory=list)
    mask: DocumentMask | None = None


def build_rows(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    steps: int,
    eval_every: int | None,
    eval_batches: int,
    planned: bool = False,
    allow_empty: bool = False,
) -> RunRows:
    """The train and valid rows of a run in GPT-NeoX's order; with `planned` the train rows by source (`rows_by_source`).

    A single train prefix with `split` is GPT-NeoX's data_path: its share of the documents, exactly steps · batch_size
    rows. Anything else is its list of paths: each source holds 1.005 times its share and they are blended, even a
    single one. With data.order `file` the train prefixes hold ready rows, served as they lie. Without `eval_every`, or
    without anything to validate on, `valid` is None.

    Raises  ConfigError, DataError if a file is missing or damaged, or too short for a row.
    Source  megatron/data/data_utils.py:269-285, 592-700 of GPT-NeoX.
    """
    check_names(config)
    evals = (steps // eval_every + 1) * eval_batches if eval_every else 0
    train_sets, valid_sets = open_sources(config)
    first, second = (
        split_documents(config.split, len(train_sets[0]))[:2]
        if config.split is not None
        else (None, None)
    )
    labels, valid_labels = label_files(config, train_sets, valid_sets)
    train: BlendedRows | RowsBySource
    if planned:
        train = rows_by_source(train_sets, config, seed, first, labels, allow_empty=allow_empty)
    else:
        train = blended_rows(train_sets, config, seed, steps * batch_size, first, labels)
    valid = valid_rows(
        train_sets[0], valid_sets, config, seed, evals * batch_size, second, valid_labels
    )
    train.labels = labels
    if valid is not None:
        valid.labels = valid_labels
    weights = normalised(config.weights, len(train_sets))
    epochs = [pack.order.epochs for pack in train.row_sources]
    order = {
        "kind": kind_of(config) + (", by plan" if planned else ""),
        "seed": seed,
        "seq_length": config.seq_length,
        "split": config.split,
        "weights": weights,
        "valid_weights": normalised(config.valid_weights, len(valid_sets)),
        "epochs": epochs,
        "batch_size": batch_size,
    }
    return RunRows(
        train=train,
        valid=valid,
        fingerprint=fingerprint(train_sets, valid_sets, order=order | label_hashes(train.labels)),
        sources=source_names(config.train),
        weights=weights,
        epochs=epochs,
        tokens=[pack.order.tokens_per_epoch for pack in train.row_sources],
        eod_id=end_id(config, "eod_mask_loss") if config.eod_mask_loss else None,
        mask=document_mask(config),
        valid_sources=source_names(config.valid or config.train[:1]) if valid else [],
    )


def check_names(config: DataConfig) -> None:
    """There is something to train on, and one thing to validate on.

    Raises  ConfigError if not.
    """
    if not config.train:
        raise ConfigError(
            "data.train is empty: name the prefix of a token file, made by `castalia prepare`"
        )
    if config.split is not None and config.valid:
        raise ConfigError(
            "data.split and data.valid both say what to validate on: set one of them to null"
        )


def open_sources(config: DataConfig) -> tuple[list[IndexedDataset], list[IndexedDataset]]:
    """The token files to train and to validate on, all of one tokenizer, the config's, so far as their records say.

    Raises  DataError, ConfigError if not: a model trained on the ids of one would be read with those of another.
    """
    train, valid = (
        [IndexedDataset(path) for path in paths] for paths in (config.train, config.valid)
    )
    made = tokenizer_facts(train + valid).get("tokenizer")
    if made and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        for dataset in train + valid:
            require_tokenizer(dataset.prefix, tokenizer, "data.tokenizer, or set it to null")
    return train, valid


def label_files(
    config: DataConfig, train_sets: list[IndexedDataset], valid_sets: list[IndexedDataset]
) -> tuple[Labels, Labels]:
    """The label files of the train and of the valid rows, where the config names any; a split shares those of train."""
    labels = open_labels(config.labels, train_sets, "labels")
    own = config.split is None
    return labels, open_labels(config.valid_labels, valid_sets, "valid_labels") if own else labels


def label_hashes(labels: Labels) -> dict[str, Any]:
    """The label files as the fingerprint names them; nothing without any."""
    return {} if labels is None else {"labels": [bin_hash(file.buffer)[1] for file in labels]}


def kind_of(config: DataConfig) -> str:
    """Order and packing as the fingerprint names them."""
    if config.packing == "packed":
        return ORDERS[config.order]
    whole = "" if config.allow_chopped else ", none too long"
    return f"neox {config.packing}{whole}{', exact' if config.neox_exact else ''}"


def blended_rows(
    datasets: list[IndexedDataset],
    config: DataConfig,
    seed: int,
    rows: int,
    documents: range | None,
    labels: Labels,
) -> BlendedRows:
    """The train rows as one sequence: of a stretch of a single source's documents, ready ones, or a blend."""
    if documents is not None:
        return one_source(datasets[0], config, seed, rows, documents, labels)
    if config.order == "file":
        return row_files(datasets, config, rows)
    return blended(datasets, config.weights, config, seed, rows, labels)


def valid_rows(
    train: IndexedDataset,
    sets: list[IndexedDataset],
    config: DataConfig,
    seed: int,
    rows: int,
    documents: range | None,
    labels: Labels,
) -> BlendedRows | None:
    """The rows to validate on, of a stretch of the train documents or of files of their own; None without any."""
    if rows and documents:
        return one_source(train, config, seed, rows, documents, labels)
    return (
        blended(sets, config.valid_weights, config, seed, rows, labels) if rows and sets else None
    )


def one_source(
    dataset: IndexedDataset,
    config: DataConfig,
    seed: int,
    rows: int,
    documents: range,
    labels: Labels,
) -> BlendedRows:
    """Rows of a stretch of one source's documents, no blend."""
    where = f"{dataset.prefix} (documents {documents.start} to {documents.stop} under data.split {config.split!r})"
    return BlendedRows(
        [pack(dataset, config, rows, seed, documents, labels[0] if labels else None, where)]
    )


def row_files(datasets: list[IndexedDataset], config: DataConfig, rows: int) -> BlendedRows:
    """Rows of files that hold them ready: a single one as it is, several blended by weight."""
    shares = normalised(config.weights, len(datasets))
    packs: list[Pack] = []
    for dataset, share in zip(datasets, shares, strict=True):
        try:
            order = FileOrder(
                dataset, seq_length=config.seq_length, num_samples=math.ceil(rows * share)
            )
        except DataError as error:
            raise DataError(f"{dataset.prefix}: {error}") from None
        packs.append(ReadyRows(dataset, order))
    cache = cache_of(datasets[0].prefix, config.order_cache)
    return (
        BlendedRows(packs)
        if len(packs) == 1
        else BlendedRows(packs, shares, rows, size=rows, cache=cache)
    )


def blended(
    datasets: list[IndexedDataset],
    weights: list[float] | None,
    config: DataConfig,
    seed: int,
    rows: int,
    labels: Labels,
) -> BlendedRows:
    """Rows of all documents of several sources, or of one, blended by weight."""
    shares = normalised(weights, len(datasets))
    counts = rows_per_source(
        weights or [1.0] * len(datasets), rows
    )  # normalised once, as GPT-NeoX does
    packs: list[Pack] = [
        pack(dataset, config, counts[i], seed, None, labels[i] if labels else None, dataset.prefix)
        for i, dataset in enumerate(datasets)
    ]
    return BlendedRows(packs, shares, rows, cache=cache_of(datasets[0].prefix, config.order_cache))


def pack(
    dataset: IndexedDataset,
    config: DataConfig,
    rows: int,
    seed: int,
    documents: range | None,
    labels: IndexedDataset | None,
    where: str,
) -> PackedDataset | PaddedRows:
    """One source under its order; an error names the source."""
    cache = cache_of(dataset.prefix, config.order_cache)
    if config.packing != "packed":
        return piece_rows(dataset, config, rows, seed, documents, labels, cache)
    options: dict[str, Any] = {
        "seq_length": config.seq_length,
        "seed": seed,
        "documents": documents,
        "cache": cache,
    }
    try:
        return PackedDataset(dataset, NeoxOrder(dataset.sizes, num_samples=rows, **options))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def normalised(weights: list[float] | None, sources: int) -> list[float]:
    """Shares that sum to 1, the same for all without weights."""
    raw = [1.0] * sources if weights is None else weights
    total = sum(raw)
    return [weight / total for weight in raw]


def document_mask(config: DataConfig) -> DocumentMask | None:
    """How data.document_mask tells documents apart; None without it."""
    if config.document_mask is None:
        return None
    return DocumentMask(end_id(config, "document_mask") if config.document_mask == "eod" else None)


def end_id(config: DataConfig, option: str) -> int:
    """The id that ends a document, for `option` of the data.

    Raises  ConfigError if the tokenizer is not named or has no such id.
    """
    if config.tokenizer is None:
        raise ConfigError(f"data.{option} needs data.tokenizer, to know the end-of-document id")
    eod_id = load_tokenizer(config.tokenizer).eod_id
    if eod_id is None:
        raise ConfigError(
            f"data.{option}: the tokenizer {config.tokenizer} has no end-of-document token"
        )
    return eod_id


def source_names(paths: list[str]) -> list[str]:
    """A name for each prefix, none twice: its last part, the whole path where two would be the same, then a number."""
    names = [Path(path).name.removesuffix(".bin").removesuffix(".idx") for path in paths]
    counts = Counter(names)
    names = [path if counts[name] > 1 else name for name, path in zip(names, paths, strict=True)]
    counts = Counter(names)
    return [f"{name}#{i}" if counts[name] > 1 else name for i, name in enumerate(names)]


def check_vocab(dataset: IndexedDataset, vocab_size: int, most_bytes: int | None = None) -> None:
    """Look through a whole token file, unless it is larger than `most_bytes`, for ids beyond `vocab_size`.

    Time    one pass over the .bin, about 1 s a GB; the loader checks each batch as well.
    Raises  DataError naming the file, the document and the id.
    """
    if most_bytes is not None and len(dataset.buffer) > most_bytes:
        return
    dataset = IndexedDataset(
        dataset.prefix
    )  # a mapping of its own: the loader's is meant for reads in no order
    width = dataset.dtype.itemsize
    total = len(dataset.buffer) // width
    for start in range(0, total, CHECK_PIECE):
        piece = view(dataset.buffer, dataset.dtype, min(CHECK_PIECE, total - start), start * width)
        if int(piece.max()) < vocab_size and int(piece.min()) >= 0:
            continue
        bad = start + int(np.flatnonzero((piece >= vocab_size) | (piece < 0))[0])
        document = document_at(dataset, bad * width)
        raise DataError(out_of_vocab(dataset.prefix, document, int(piece[bad - start]), vocab_size))


def document_at(dataset: IndexedDataset, byte: int) -> int:
    """The document whose tokens cover a byte of the .bin, -1 if none does."""
    ends = dataset.pointers + dataset.sizes.astype(np.int64) * dataset.dtype.itemsize
    found = np.flatnonzero((dataset.pointers <= byte) & (byte < ends))
    return int(found[0]) if len(found) else -1


def out_of_vocab(prefix: str, document: int, token: int, vocab_size: int) -> str:
    """The sentence about an id that the model does not have."""
    return (
        f"{prefix}: document {document} has token id {token}, but the model's vocabulary has {vocab_size} ids;"
        " prepare the text with the model's tokenizer, or set model.vocab_size"
    )
