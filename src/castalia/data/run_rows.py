"""The rows of a run: each source cut into rows, all of them blended into one sequence for the
steps."""

import math
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

from castalia.data.batch_sizes import BatchSizes, Ramp
from castalia.data.config import DataConfig
from castalia.data.damage import require_whole
from castalia.data.fim import fill_in_the_middle
from castalia.data.fingerprint import bin_hash, contents, fingerprint
from castalia.data.order import rows_per_source, split_documents
from castalia.data.order_cache import cache_of
from castalia.data.packing_order import PackingOrder
from castalia.data.packings import cut_into_rows
from castalia.data.ready_rows import ready_rows
from castalia.data.row_source import RowOrder, RowSource
from castalia.data.rows_by_source import RowsBySource, no_rows, one_pass, rows_by_source
from castalia.data.segments import DocumentMask, document_mask, end_of_document
from castalia.data.served import BlendedRows, ServedRows
from castalia.data.sources import (
    Files,
    check_names,
    left_out,
    open_files,
    shares_of,
    source_names,
    with_document_weights,
)

ORDERS = {"neox": "neox packed", "file": "rows as in the file"}
"""Names of the orders in the fingerprint. Every checkpoint holds them, so they must not change."""


@dataclass(frozen=True)
class RunRows:
    """The train and valid rows of a run, and what is known about them; made by `build_rows`."""

    train: ServedRows
    valid: BlendedRows | None
    """None without validation."""
    fingerprint: dict[str, Any]
    sources: list[str]
    """Names of the train sources."""
    weights: list[float] = field(default_factory=list)
    """Weight of each train source; they sum to 1."""
    epochs: list[int] = field(default_factory=list)
    """Passes over the documents in the order of each train source."""
    tokens: list[int] = field(default_factory=list)
    """Tokens in one pass over each train source."""
    tokens_per_row: list[float] = field(default_factory=list)
    """Mean tokens of each train source in one of its rows, padding left out."""
    eod_id: int | None = None
    """Id whose following target does not count; None unless data.eod_mask_loss is set."""
    valid_sources: list[str] = field(default_factory=list)
    """Names of the valid sources."""
    mask: DocumentMask | None = None
    """How the documents of a row are told apart; None unless data.document_mask is set."""


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
    epochs: int | None = None,
    ramp: Ramp | None = None,
    keep_rest: bool = False,
) -> RunRows:
    """The train and valid rows of a run, in GPT-NeoX's order; `planned` keeps train rows by source.

    A single train prefix with `split` is GPT-NeoX's data_path: its share of the documents and
    exactly steps · batch_size rows. Anything else is GPT-NeoX's list of paths: each source holds
    1.005 times its share, and the sources are blended, even a single one; one of weight 0 has no
    rows. With data.order `file` the train prefixes hold ready rows, served in the order of the
    file. `valid` is None without `eval_every` or validation data. `allow_empty` accepts sources too
    short for a row, for mixers that give them weight 0. With `epochs` one pass is repeated, without
    the rows that fill no batch unless `keep_rest`. With a `ramp` the first batches are smaller.

    Raises  ConfigError; DataError if a file is missing, damaged or too short for a row.
    Source  megatron/data/data_utils.py:269-285, 592-700 of GPT-NeoX.
    """
    check_names(config)
    files, valid_files = open_files(config)
    valid_sets = [] if config.split is not None else valid_files.tokens
    config = with_document_weights(config, files.tokens, valid_sets)
    train_documents, valid_documents = split_of(config, len(files.tokens[0]))
    sizes = BatchSizes(batch_size, ramp)
    train: BlendedRows | RowsBySource
    if planned:
        train = rows_by_source(files, config, seed, train_documents, allow_empty)
    elif epochs is not None:
        train = whole_passes(files, config, seed, 1 if keep_rest else batch_size, train_documents)
    else:
        train = train_rows(files, config, seed, sizes.first(steps), train_documents)
    train.attach(files)
    train.fim = fill_in_the_middle(config, seed)
    count = evaluations(steps, eval_every) * eval_batches * batch_size
    valid = valid_rows(valid_files, config, seed, count, valid_documents)

    settings = order_settings(config, train, seed, sizes, Served(planned, epochs is not None))
    valid_prefixes = config.valid_prefixes or config.train_prefixes[:1]
    return RunRows(
        train=train,
        valid=valid,
        fingerprint=fingerprint_of(config, files, valid_files, settings),
        sources=source_names(config.train_prefixes),
        weights=settings["weights"],
        epochs=settings["epochs"],
        tokens=[source.order.tokens_per_epoch for source in train.row_sources],
        tokens_per_row=[tokens_per_row(source.order) for source in train.row_sources],
        eod_id=end_of_document(config, "eod_mask_loss") if config.eod_mask_loss else None,
        valid_sources=source_names(valid_prefixes) if valid else [],
        mask=document_mask(config),
    )


def tokens_per_row(order: RowOrder) -> float:
    """Mean tokens of the documents in a row, padding left out."""
    return order.tokens_per_row if isinstance(order, PackingOrder) else order.seq_length


def evaluations(steps: int, every: int | None) -> int:
    """GPT-NeoX's count: an evaluation after every so many steps, and one at the end."""
    return steps // every + 1 if every else 0


def rows_of_a_pass(config: DataConfig, *, seed: int) -> int:
    """Rows of one pass over the training data: those that `build_rows` serves with `epochs`.

    Raises  ConfigError; DataError if a file is missing, damaged or too short for a row.
    """
    return sum(rows_of_sources(config, seed=seed))


def rows_of_sources(config: DataConfig, *, seed: int) -> list[int]:
    """Rows of one pass over each training source.

    Raises  ConfigError; DataError if a file is missing, damaged or too short for a row.
    """
    check_names(config)
    files, _ = open_files(config)
    documents, _ = split_of(config, len(files.tokens[0]))
    return [rows_once(source) for source in pass_sources(files, config, seed, documents)]


def rows_once(source: RowSource[Any]) -> int:
    """Rows of a source in one pass: GPT-NeoX's count, which of a packed source leaves out the last
    in its order, or the only row."""
    return max(1, len(source))


def pass_sources(
    files: Files, config: DataConfig, seed: int, documents: range | None
) -> list[RowSource[Any]]:
    """Each source cut into the rows of one pass."""
    sources = [files.of(number) for number in range(len(files))]
    return [one_pass(source, config, seed, documents, False) for source in sources]


def whole_passes(
    files: Files, config: DataConfig, seed: int, batch_size: int, documents: range | None
) -> BlendedRows:
    """One pass over all sources, repeated, as GPT-NeoX's train_epochs.

    Each source counts by its rows, so that every row comes once a pass; GPT-NeoX takes the sources
    in equal parts, and thereby repeats small ones within a pass.
    """
    row_sources = pass_sources(files, config, seed, documents)
    counts = [rows_once(source) for source in row_sources]
    # Rows that do not fill a last batch are left out, as GPT-NeoX's loader drops them.
    rows = sum(counts) // batch_size * batch_size
    cache = cache_of(files.tokens[0].prefix, config.order_cache)
    return BlendedRows(row_sources, shares_of(counts, len(counts)), rows, size=rows, cache=cache)


def split_of(config: DataConfig, documents: int) -> tuple[range | None, range | None]:
    """The train and valid documents under data.split; None without it."""
    if config.split is None:
        return None, None
    # The third part, test, is not served by a run.
    train, valid, _ = split_documents(config.split, documents)
    return train, valid


class Served(NamedTuple):
    """How the rows of a run are chosen among those of its sources."""

    planned: bool
    """By a plan of each step."""
    passes: bool
    """All of them, pass by pass."""


def order_settings(
    config: DataConfig,
    train: BlendedRows | RowsBySource,
    seed: int,
    sizes: BatchSizes,
    served: Served,
) -> dict[str, Any]:
    """The settings that decide the order, for the fingerprint."""
    kind = order_kind(config)
    weights = config.weights
    if served.planned:
        kind += ", by plan"
    elif served.passes:
        kind += ", pass by pass"
        # Every row once: a source counts by its rows.
        weights = [rows_once(source) for source in train.row_sources]
    settings = {
        "kind": kind,
        "seed": seed,
        "seq_length": config.seq_length,
        "split": config.split,
        "weights": shares_of(weights, len(config.train_prefixes)),
        "valid_weights": shares_of(config.valid_weights, len(config.valid_prefixes)),
        "epochs": [source.order.epochs for source in train.row_sources],
        "batch_size": sizes.rows,
    }
    if train.fim is not None:
        settings["fim"] = [train.fim.rate, train.fim.spm_rate, *train.fim.sentinels]
    if sizes.ramp is not None:
        settings["batch_ramp"] = list(sizes.ramp)
    if config.packing in ("unpacked", "pack_until_overflow") and not served.planned:
        # Even within one pass the number of rows decides which of them come first.
        settings["rows"] = [len(source.order) for source in train.row_sources]
    sides = train.sides
    for name in ("labels", "label_weights", "reference"):
        beside = [file for side in sides for file in getattr(side, name) or ()]
        if beside:
            settings[name] = [bin_hash(file.buffer)[1] for file in beside]
    if train.rewards is not None:
        settings["rewards"] = [sha256(values.tobytes()).hexdigest() for values in train.rewards]
    return settings


def fingerprint_of(
    config: DataConfig, files: Files, valid: Files, settings: dict[str, Any]
) -> dict[str, Any]:
    """The fingerprint of the token files of both sides, and of the order.

    Raises  DataError if a hash in it differs from that in a file's record.
    """
    # Both parts of a split come from the same files, which count once.
    own_valid = Files([]) if config.split is not None else valid
    found = fingerprint(files.tokens, own_valid.tokens, order=settings)
    if files.rejected is not None:
        found["rejected"] = [contents(file) for file in files.rejected.tokens]
        rejected = own_valid.rejected or Files([])
        found["valid_rejected"] = [contents(file) for file in rejected.tokens]
    if config.verify != "never":
        require_whole(files, valid, found)
    return found


def order_kind(config: DataConfig) -> str:
    """Order and packing as the fingerprint names them; checkpoints hold these words."""
    if config.packing == "packed":
        return ORDERS[config.order]
    kind = f"neox {config.packing}"
    if config.paired:
        kind += ", pairs"
    if not config.allow_chopped:
        kind += ", none too long"
    if config.neox_exact:
        kind += ", exact"
    return kind


def train_rows(
    files: Files, config: DataConfig, seed: int, rows: int, documents: range | None
) -> BlendedRows:
    """The train rows as one sequence: a split of a single source, ready rows, or a blend."""
    if documents is not None:
        return split_rows(files, config, seed, rows, documents)
    if config.order == "file":
        return blend_files(files, config, rows)
    return blend_sources(files, config.weights, config, seed, rows)


def valid_rows(
    files: Files, config: DataConfig, seed: int, rows: int, documents: range | None
) -> BlendedRows | None:
    """The valid rows: a split of the train source, or a blend of files; None without either."""
    if not rows or not (documents if config.split is not None else files.tokens):
        return None
    if documents:
        valid = split_rows(files, config, seed, rows, documents)
    else:
        valid = blend_sources(files, config.valid_weights, config, seed, rows)
    valid.attach(files)
    return valid


def split_rows(
    files: Files, config: DataConfig, seed: int, rows: int, documents: range
) -> BlendedRows:
    """Rows of some documents of a single source, without a blend."""
    return BlendedRows(
        [cut_into_rows(files.of(0), config, rows=rows, seed=seed, documents=documents)]
    )


def blend_files(files: Files, config: DataConfig, rows: int) -> BlendedRows:
    """Rows of files that hold ready rows: a single file as it is, several blended by weight."""
    shares = shares_of(config.weights, len(files))
    leave = left_out(config.weights, len(files), rows)
    row_sources: list[RowSource[Any]] = []
    for number, (dataset, share) in enumerate(zip(files.tokens, shares, strict=True)):
        if leave[number]:
            row_sources.append(no_rows(dataset, config))
            continue
        # Without GPT-NeoX's margin of 1.005: a file that runs out starts again.
        own_rows = math.ceil(rows * share)
        row_sources.append(ready_rows(dataset, seq_length=config.seq_length, rows=own_rows))
    if len(row_sources) == 1:
        return BlendedRows(row_sources)
    cache = cache_of(files.tokens[0].prefix, config.order_cache)
    return BlendedRows(row_sources, shares, rows, size=rows, cache=cache)


def blend_sources(
    files: Files, weights: list[float] | None, config: DataConfig, seed: int, rows: int
) -> BlendedRows:
    """Rows of all documents of one or several sources, blended by weight."""
    # From the raw weights, not the shares: GPT-NeoX normalises once, and rounding twice may add a
    # row.
    counts = rows_per_source(weights or [1.0] * len(files), rows)
    leave = left_out(weights, len(files), rows)
    row_sources: list[RowSource[Any]] = []
    for number, dataset in enumerate(files.tokens):
        if leave[number]:
            row_sources.append(no_rows(dataset, config))
            continue
        row_sources.append(cut_into_rows(files.of(number), config, rows=counts[number], seed=seed))
    shares = shares_of(weights, len(files))
    cache = cache_of(files.tokens[0].prefix, config.order_cache)
    return BlendedRows(row_sources, shares, rows, cache=cache)
