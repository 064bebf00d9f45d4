"""Held-out losses of a run's validations as rows of its results table."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from castalia import __version__
from castalia.core.extras import require
from castalia.data import RunRows
from castalia.losses import LOSSES
from castalia.results import Result
from castalia.results.schema import PACKAGES, Labels, is_installed
from castalia.results.store import EXTRA, PURPOSE, ResultsStore, now
from castalia.runs.config import RunConfig


def keeps_validations(config: RunConfig, rows: RunRows) -> bool:
    """Whether a run puts its validations into the results table.

    Raises  ConfigError if it is to, and the extra is missing.
    """
    if rows.valid is None or config.train.eval_every is None:
        return False
    if config.eval.validations:
        for name in PACKAGES:
            require(name, EXTRA, PURPOSE)
    if config.eval.validations is None:
        return is_installed()
    return config.eval.validations


class ValidationRows:
    """Held-out loss and bits per byte of the validations as rows of the results table.

    Rows are kept until `flush`: the table is one file, written anew each time.
    """

    def __init__(
        self, config: RunConfig, rows: RunRows, bytes_per_token: Mapping[str, float]
    ) -> None:
        self.config = config
        self.sources = rows.valid_sources
        self.bytes_per_token = bytes_per_token
        self.files = files_of(config, rows.fingerprint)
        # Another loss than the cross-entropy has no bits.
        self.counts = LOSSES[config.loss.kind].by_source
        self.waiting: list[Result] = []

    def take(self, labels: Labels, metrics: Mapping[str, Any]) -> None:
        """The numbers of a step, if it has a validation."""
        if not self.counts or "valid_loss" not in metrics:
            return
        sources: Mapping[str, Mapping[str, float]] = metrics.get("valid_sources", {})
        if not sources and len(self.sources) == 1:
            # Of one source there is the loss alone.
            name = self.sources[0]
            loss = metrics["valid_loss"]
            sources = {name: {"loss": loss}}
            if name in self.bytes_per_token:
                bits = loss / math.log(2) / self.bytes_per_token[name]
                sources = {name: {"loss": loss, "bits_per_byte": bits}}
        for name, numbers in sources.items():
            for metric in ("bits_per_byte", "loss"):
                if metric in numbers and math.isfinite(numbers[metric]):
                    self.waiting.append(self.row(labels, name, metric, numbers[metric]))

    def row(self, labels: Labels, source: str, metric: str, value: float) -> Result:
        """One number."""
        return labels.result(
            f"bits_per_byte/{source}",
            metric,
            float(value),
            higher_is_better=False,
            harness=f"castalia {__version__}",
            task_version="validation",
            task_hash=self.hash_of(source),
            batch=self.config.train.micro_batch_size,
            evaluated_at=now(),
        )

    def hash_of(self, source: str) -> str:
        """Of what decides which tokens a validation reads, 16 digits."""
        train = self.config.train
        length = self.config.data.seq_length
        facts = (source, length, train.batch_size, train.eval_batches, self.files)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def flush(self, store: ResultsStore) -> None:
        """Write the rows that wait."""
        if self.waiting:
            store.add(self.waiting)
            self.waiting = []


def files_of(config: RunConfig, fingerprint: Mapping[str, Any]) -> list[Any]:
    """What the held-out text is, by its bytes and not by its name."""
    held_out = fingerprint["valid"]
    # Without files of its own it is a share of the documents that the run trains on.
    chosen = held_out or fingerprint["train"]
    files: list[Any] = [{k: v for k, v in file.items() if k != "name"} for file in chosen]
    return files if held_out else [*files, config.data.split]
