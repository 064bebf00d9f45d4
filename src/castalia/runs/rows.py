"""The rows of a run: those that its config gives, and those that its training has read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from castalia.data import RunRows, build_rows
from castalia.data.labels import require_both_labels
from castalia.data.rows_by_source import RowsBySource
from castalia.data.run_rows import rows_of_sources
from castalia.data.served import RepeatedRows
from castalia.data.sidecar import recorded_end
from castalia.interventions.intervention import Facts
from castalia.interventions.make import make_interventions
from castalia.losses import LOSSES
from castalia.runs.config import RunConfig
from castalia.runs.named_corpus import ensure_corpus
from castalia.runs.recorded_order import RecordedOrder
from castalia.runs.whole_passes import with_steps
from castalia.tokenizers.tokenizer import load_tokenizer


def opened_rows(config: RunConfig, *, validates: bool = True) -> tuple[RunConfig, RunRows]:
    """The config with the steps that its passes fill, and the rows that they read.

    Raises  as `with_steps` and `rows_of_run`.
    """
    config = with_steps(config)
    return config, rows_of_run(config, validates=validates)


def rows_of_run(config: RunConfig, *, validates: bool = True) -> RunRows:
    """The rows that a run of this config reads; without those of its validations on demand.

    Raises  ConfigError; DataError if a file is missing, damaged or too short for a row.
    """
    train = config.train
    data = config.data
    epochs = train.epochs
    if data.texts and epochs is not None and data.packing == "best_fit":
        # Its passes run into each other, each shuffled anew; see whole_passes.py.
        # That of the other packings shuffles the records of all passes together.
        epochs = None
        if data.weights is None and len(data.train_prefixes) > 1:
            counts = rows_of_sources(data, seed=config.order_seed)
            data = data.model_copy(update={"weights": counts})
    rows = build_rows(
        data,
        seed=config.order_seed,
        batch_size=train.batch_size,
        # Steps that take the same rows read them once.
        steps=-(-train.steps // config.updates_per_rows),
        eval_every=train.eval_every if validates else None,
        eval_batches=train.eval_batches,
        planned=config.mixing.plans,
        allow_empty=config.mixing.allow_empty,
        ramp=train.batch_ramp,
        epochs=epochs,
        keep_rest=bool(data.texts),
    )
    if LOSSES[config.loss.kind].rows == "labelled":
        require_both_labels(rows.train.rewards or ())
    if data.interventions:
        rows = with_interventions(config, rows)
    if config.updates_per_rows == 1:
        return rows
    return replace(rows, train=RepeatedRows(rows.train, train.batch_size, config.updates_per_rows))


def with_interventions(config: RunConfig, rows: RunRows) -> RunRows:
    """The rows with the changes that data.interventions make to those of training.

    Raises  ConfigError; DataError if a file that one names cannot be read.
    """
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    end = recorded_end(data.train_prefixes)
    if end is None and tokenizer is not None:
        end = tokenizer.eod_id
    first, *others = [
        Facts(
            tokenizer,
            rows.sources,
            [source.dataset for source in side.row_sources],
            config.model.vocab_size,
            data.seq_length,
            end,
            ready=data.order == "file",
        )
        for side in rows.train.sides
    ]
    train = config.train
    made = make_interventions(data.interventions, first, train.steps, train.batches)
    rows.train.changes = made
    for side, facts in zip(rows.train.sides[1:], others, strict=True):
        side.changes = made.of(facts)
    return replace(rows, fingerprint=rows.fingerprint | {"interventions": made.sha256})


def rows_as_trained(
    config: RunConfig, say: Callable[[str], None] = print
) -> tuple[RunConfig, RunRows]:
    """The config with its corpus and its steps, and the rows that its steps train on.

    The order of a mixed run follows from the mixture.jsonl in its folder.
    Raises  ConfigError; DataError if a file is missing, damaged or too short for a row.
    """
    config, rows = opened_rows(ensure_corpus(config, say=say), validates=False)
    if isinstance(rows.train, RowsBySource):
        # A mixer decided the order as the run went on: it can be read, but not computed again.
        rows.train.order = RecordedOrder(config, rows, Path(config.output) / "mixture.jsonl")
    return config, rows
