"""Rows of results tables that a sweep need not measure again."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from castalia.eval.labels import Arithmetic, Labels, ahead, is_computed_so
from castalia.eval.places import Checkpoint
from castalia.eval.work import Expected
from castalia.results import ResultsStore
from castalia.results.schema import Result

Key = tuple[str, str, str, int | None]
"""Suite, model, variant and step."""


class Subject(NamedTuple):
    """A checkpoint in one arithmetic."""

    checkpoint: Checkpoint
    how: Arithmetic

    @property
    def key(self) -> Key:
        """Of its rows."""
        one = self.checkpoint
        return one.suite, one.model, one.variant, one.step

    @property
    def identity(self) -> tuple[object, ...]:
        """What its numbers depend on."""
        one = self.checkpoint
        return (*self.key, one.stores[0], one.weights_hash, *ahead(one.path, self.how))


class Found:
    """The rows that the tables of some checkpoints have about them.

    Raises  DataError if a table is damaged.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self.rows: dict[Key, list[Result]] = defaultdict(list)
        checkpoints = list(checkpoints)
        models = sorted({checkpoint.model for checkpoint in checkpoints})
        folders = {folder: None for one in checkpoints for folder in one.stores}
        for folder in folders:
            store = ResultsStore(folder)
            if not store.path.exists():
                continue
            # The table of a large suite has a million rows; these are the ones of interest.
            names, rows = store.query(
                "SELECT * FROM results WHERE list_contains(?, model)", [models]
            )
            for values in rows:
                row = Result(**dict(zip(names, values, strict=True)))
                self.rows[row.suite, row.model, row.variant, row.step].append(row)

    def rows_of(self, subject: Subject, expected: Sequence[Expected]) -> list[Result]:
        """The rows of a checkpoint in one arithmetic, in the order of `expected` and metrics."""
        return latest(self.own_rows(subject), expected)

    def has_all(self, subject: Subject, expected: Sequence[Expected]) -> bool:
        """Whether every expected row is there."""
        own = self.own_rows(subject)
        return all(any(wanted.matches(row) for row in own) for wanted in expected)

    def own_rows(self, subject: Subject) -> list[Result]:
        """All rows of a checkpoint in one arithmetic."""
        engine, dtype = ahead(subject.checkpoint.path, subject.how)
        weights = subject.checkpoint.weights_hash
        return [
            row
            for row in self.rows.get(subject.key, [])
            if row.engine == engine
            # An export's own dtype is known by its weights alone.
            and (is_computed_so(row.dtype, dtype) if dtype else row.checkpoint_hash == weights)
            # A table of a run in training has no hash of weights that were not saved yet.
            and (None in (weights, row.checkpoint_hash) or row.checkpoint_hash == weights)
        ]


def rows_with(checkpoint: Checkpoint, labels: Labels) -> list[Result]:
    """The rows of a checkpoint that was loaded, in its very arithmetic.

    Raises  DataError if a table is damaged.
    """
    found = Found([checkpoint])
    weights = labels.checkpoint_hash
    return [
        row
        for row in found.rows.get((labels.suite, labels.model, labels.variant, labels.step), [])
        if (row.engine, row.dtype) == (labels.engine, labels.dtype)
        and (None in (weights, row.checkpoint_hash) or row.checkpoint_hash == weights)
    ]


def latest(own: Sequence[Result], expected: Sequence[Expected]) -> list[Result]:
    """Of a checkpoint's rows those that are expected, in that order and by metric."""
    # Of a run that has a table and whose suite has one, a number may be there twice.
    chosen: dict[tuple[object, ...], Result] = {}
    for wanted in expected:
        for row in sorted(own, key=lambda row: (row.metric, row.filter)):
            if wanted.matches(row):
                key = (row.task, row.metric, row.filter, row.shots)
                before = chosen.get(key)
                if before is None or is_newer(row, before):
                    chosen[key] = row
    return list(chosen.values())


def is_newer(row: Result, other: Result) -> bool:
    """Whether a row was measured after another."""
    if row.evaluated_at is None or other.evaluated_at is None:
        return other.evaluated_at is None
    return row.evaluated_at > other.evaluated_at
