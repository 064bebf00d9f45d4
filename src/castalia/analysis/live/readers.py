"""What a reader asks of a run on demand: the rows of a step, with text, source and documents."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.batch_sizes import BatchSizes
from castalia.data.run_rows import RunRows
from castalia.stream.viewing import record_of, require_own_tokenizer
from castalia.tokenizers.tokenizer import Tokenizer

MOST_ROWS = 64
"""Rows in one answer: at 2,048 tokens each, half a megabyte of text."""
KEPT_ROWS = 4096
"""Rows whose text is kept, so that a search in a batch decodes it once."""


@dataclass
class OpenRows:
    """The rows of a run, opened."""

    rows: RunRows
    batches: BatchSizes
    steps: int
    """Steps of the whole run."""
    tokenizer: Tokenizer | None
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows that were read, by their place in the run's order."""

    def record(self, place: int) -> dict[str, Any]:
        """The row at a place, as `castalia data view` shows it."""
        if place not in self.records:
            if len(self.records) >= KEPT_ROWS:
                self.records.clear()
            self.records[place] = record_of(self.rows, place, self.batches, self.tokenizer)
        return self.records[place]

    def ids(self, place: int) -> NDArray[np.int64]:
        """(seq_length + 1,) the tokens of the row at a place."""
        return self.rows.train[place][0]

    def places(self, step: int) -> range:
        """The places of the rows of a step, counted from 0.

        Raises  DataError if the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise DataError(f"step {step}: the run has the steps 0 to {self.steps - 1}")
        return self.batches.places(step)


class Row(NamedTuple):
    """One row of a run."""

    source: str
    ids: NDArray[np.int64]
    """(seq_length + 1,) tokens."""


OpenRun = Callable[[Path], OpenRows]
"""Opens the rows of the run in a folder."""


class Batches:
    """Rows of runs, read one request at a time: the order of a mixed run is planned in sequence."""

    def __init__(self, open_run: OpenRun) -> None:
        self.open_run = open_run
        self.lock = threading.Lock()
        self.key: tuple[Any, ...] = ()
        self.opened: OpenRows | None = None

    def of(self, folder: Path) -> OpenRows:
        """The rows of a run; the newest one stays open. The caller holds the lock."""
        # A mixed run's record grows, and a resume may change the config.
        files = [folder / "config.yaml", folder / "mixture.jsonl"]
        key = (folder, *(file.stat().st_mtime_ns for file in files if file.exists()))
        if self.opened is None or key != self.key:
            self.opened = None
            opened = self.open_run(folder)
            require_own_tokenizer(opened.rows, opened.tokenizer)
            self.opened = opened
            self.key = key
        return self.opened

    def batch(
        self, folder: Path, step: int, first: int = 0, count: int = 16, search: str = ""
    ) -> dict[str, Any]:
        """Rows of a step as JSON values: of those that hold `search`, `count` from `first` on.

        Raises  DataError or ConfigError as the data say; TrainingError for a step that a mixed run
                has not planned yet.
        """
        with self.lock:
            opened = self.of(folder)
            places: Sequence[int] = opened.places(step)
            if search:
                places = [place for place in places if holds(opened.record(place), search)]
            shown = places[first : first + min(count, MOST_ROWS)]
            return {
                "step": step,
                "steps": opened.steps,
                "batch_size": opened.batches.size(step),
                "matching": len(places),
                "first": first,
                "text": opened.tokenizer is not None,
                "rows": [self.row(opened, place) for place in shown],
            }

    def row(self, opened: OpenRows, place: int) -> dict[str, Any]:
        """One row; without a tokenizer its ids."""
        record = opened.record(place)
        if opened.tokenizer is not None:
            return record
        return record | {"text": " ".join(map(str, opened.ids(place).tolist()))}

    def ids_of(self, folder: Path, step: int, most: int) -> tuple[list[Row], Tokenizer | None]:
        """The first `most` rows of a step, and the tokenizer of the run.

        Raises  as `batch`.
        """
        with self.lock:
            opened = self.of(folder)
            rows = [
                Row(opened.record(place)["source"], opened.ids(place))
                for place in opened.places(step)[:most]
            ]
            return rows, opened.tokenizer


def holds(record: dict[str, Any], search: str) -> bool:
    """Whether a row's text or source has the words, in whatever case."""
    words = search.casefold()
    return words in str(record.get("text", "")).casefold() or words in record["source"].casefold()
