"""The columns of the results table: one row is one number of one checkpoint."""

from datetime import datetime
from importlib.util import find_spec
from typing import Any, NamedTuple

EVALS = "evals"
"""Folder of a table in the folder of a run or a suite, and of a table that belongs to neither."""
PACKAGES = ("duckdb", "pyarrow")
"""Of the extra `results`."""

COLUMNS = {
    "suite": "TEXT",
    "model": "TEXT",
    "variant": "TEXT",
    "size": "TEXT",
    "parameters": "BIGINT",
    "seed": "BIGINT",
    "step": "BIGINT",
    "last_step": "BIGINT",
    "tokens": "BIGINT",
    "task": "TEXT",
    "metric": "TEXT",
    "filter": "TEXT",
    "shots": "INTEGER",
    "value": "DOUBLE",
    "stderr": "DOUBLE",
    "documents": "BIGINT",
    "higher_is_better": "BOOLEAN",
    "harness": "TEXT",
    "task_version": "TEXT",
    "task_hash": "TEXT",
    "dtype": "TEXT",
    "engine": "TEXT",
    "batch": "INTEGER",
    "seconds": "DOUBLE",
    "evaluated_at": "TIMESTAMP",
    "checkpoint": "TEXT",
    "checkpoint_hash": "TEXT",
    "source": "TEXT",
}
"""Name -> type in SQL, in the order of `Result`."""

KEY = (
    *("suite", "model", "variant", "seed", "step", "task", "metric", "filter", "shots"),
    *("documents", "harness", "task_version", "task_hash", "dtype", "engine"),
)
"""Columns that tell two numbers apart; of two rows that agree in all of them, the one with the
later `evaluated_at` stands."""

CONDITIONS = ("harness", "task_version", "task_hash", "dtype", "engine", "shots", "documents")
"""Columns that must agree before two numbers of a task and metric compare."""


def is_installed() -> bool:
    """Whether the extra `results` is there; looked up, for its packages take a while to import."""
    return all(find_spec(name) for name in PACKAGES)


class Result(NamedTuple):
    """One number. None is unknown."""

    suite: str
    """The suite: its folder's name, or `pythia-v1`, `pythia-v0`, `opt`, `bloom`."""
    model: str
    """The model in the suite, such as `pythia-70m`; for a run, the name of its folder."""
    task: str
    metric: str
    """Such as acc, acc_norm, perplexity, bits_per_byte, loss."""
    value: float
    variant: str = ""
    """Such as `intervention`; "" for the model itself."""
    size: str | None = None
    """The size as its name says it, such as `70m`."""
    parameters: int | None = None
    """Total parameters."""
    seed: int | None = None
    """Of the start weights; runs of other data seeds are other models."""
    step: int | None = None
    """Optimizer steps of the checkpoint."""
    last_step: int | None = None
    """Steps of the whole training run."""
    tokens: int | None = None
    """Tokens that the checkpoint was trained on."""
    filter: str = "none"
    """The harness's filter of the answers."""
    shots: int | None = None
    stderr: float | None = None
    documents: int | None = None
    """Documents that the number is a mean of."""
    higher_is_better: bool | None = None
    harness: str | None = None
    """Name and version of what computed the number, such as `lm-eval 0.4.13`."""
    task_version: str | None = None
    task_hash: str | None = None
    """SHA-256 of the task's resolved config, 16 digits."""
    dtype: str | None = None
    engine: str | None = None
    batch: int | None = None
    """Rows in a batch."""
    seconds: float | None = None
    """Time of the task on the checkpoint; every metric of it has the same."""
    evaluated_at: datetime | None = None
    """When, in UTC, without a zone."""
    checkpoint: str | None = None
    """Path or hub id."""
    checkpoint_hash: str | None = None
    """SHA-256 of what identifies its weights, 16 digits; a hub's commit for a hub id."""
    source: str | None = None
    """The imported file."""


class Labels(NamedTuple):
    """The columns that all rows of a checkpoint share. None is unknown."""

    suite: str
    model: str
    variant: str = ""
    size: str | None = None
    parameters: int | None = None
    seed: int | None = None
    step: int | None = None
    last_step: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    engine: str | None = None
    checkpoint: str | None = None
    checkpoint_hash: str | None = None

    def result(self, task: str, metric: str, value: float, **more: Any) -> Result:
        """A row of the table; `more` are other columns of it."""
        return Result(**self._asdict() | {"task": task, "metric": metric, "value": value} | more)
