"""What interventions change, without training: rows, tokens and examples, by step and source."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.curriculum import Curriculum
from castalia.data.row_changes import ServedRow
from castalia.data.served import ServedRows
from castalia.interventions.intervention import Notes
from castalia.interventions.make import Interventions


class Example(NamedTuple):
    """One change, as a report shows it."""

    step: int
    row: int
    """Its number within the step."""
    source: str
    document: int
    """Its number in the source's token file; of an inserted one in the file of inserted ones."""
    intervention: str
    before: str
    after: str


@dataclass
class Report:
    """What interventions change in a range of steps."""

    first: int
    stop: int
    rows: int = 0
    """Rows of these steps."""
    tokens: int = 0
    """Tokens of these rows as their steps read them, the last target of each included."""
    rows_changed: int = 0
    tokens_changed: int = 0
    """Tokens that are replaced: of a change of equal length those that differ. One that several
    interventions replace counts once."""
    targets_ignored: int = 0
    """Tokens that become no targets."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Changes that are not made, by reason."""
    refused: list[str] = field(default_factory=list)
    """Why training would stop, for the first rows with a change of length that is not allowed."""
    rows_refused: int = 0
    by_step: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Rows and tokens changed in each step with any."""
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows and tokens changed in each source with any."""
    by_intervention: Counter[str] = field(default_factory=Counter)
    """Changes that each intervention made."""
    examples: list[Example] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Tokens changed of all."""
        return self.tokens_changed / max(1, self.tokens)

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        steps = [
            {"step": step, "rows_changed": rows, "tokens_changed": tokens}
            for step, (rows, tokens) in self.by_step.items()
        ]
        sources = {
            name: {"rows_changed": rows, "tokens_changed": tokens}
            for name, (rows, tokens) in self.by_source.items()
        }
        return {
            "steps": [self.first, self.stop],
            "rows": self.rows,
            "rows_changed": self.rows_changed,
            "tokens": self.tokens,
            "tokens_changed": self.tokens_changed,
            "share": self.share,
            "targets_ignored": self.targets_ignored,
            "left_out": dict(self.left_out),
            "rows_refused": self.rows_refused,
            "refused": self.refused,
            "by_step": steps,
            "by_source": sources,
            "by_intervention": dict(self.by_intervention),
            "examples": [example._asdict() for example in self.examples],
        }


def dry_run(
    rows: ServedRows, first: int, stop: int, curriculum: Curriculum, examples: int = 5
) -> Report:
    """What the interventions of a run's rows change in steps `first` to `stop` - 1, of what the
    curriculum has these steps read.

    Raises  DataError for places that a mixed run has not read yet.
    """
    changes = made_of(rows)
    report = Report(first, stop)
    for step in range(first, stop):
        read = curriculum.length(step + 1) + 1
        for place in changes.sizes.places(step):
            report.rows += 1
            report.tokens += read
            if changes.reaches(place):
                add_row(report, rows, place, read, examples)
    return report


def made_of(rows: ServedRows) -> Interventions:
    """The interventions of rows that have some."""
    assert isinstance(rows.changes, Interventions), rows.changes
    return rows.changes


def add_row(report: Report, rows: ServedRows, place: int, read: int, examples: int) -> None:
    """Count what happens to the first `read` tokens of the row at a place, on all sides of a
    pair."""
    source, own_place = rows.locate(place)
    tokens = 0
    changed = False
    for side in rows.sides:
        changes = made_of(side)
        spans = side.row_sources[source].documents_of(own_place)
        row = ServedRow(side.row_sources[source].row(spans), spans)
        try:
            after, notes = changes.noted(row, source, place)
        except DataError as error:
            # Training would stop here; a report goes on, to name all such rows at once.
            report.rows_refused += 1
            report.refused = [*report.refused, str(error)][:examples]
            continue
        for item, noted in zip(changes.items, notes, strict=True):
            noted.edits = [(span, edit) for span, edit in noted.edits if edit.start < read]
            report.left_out.update(noted.left_out)
            report.by_intervention[item.where] += len(noted.edits)
            if len(report.examples) < examples:
                found = examples_of(noted, changes, source, place, item.where)
                report.examples = [*report.examples, *found][:examples]
        tokens += int(replaced(row, notes)[:read].sum())
        changed |= not np.array_equal(after.tokens[:read], row.tokens[:read])
        if after.ignored is not None:
            ignored = int(after.ignored[:read].sum())
            report.targets_ignored += ignored
            changed |= ignored > 0
    if changed:
        made = made_of(rows)
        count(report, made.sizes.step_of(place)[0], made.facts.names[source], tokens)


def count(report: Report, step: int, source: str, tokens: int) -> None:
    """Count a changed row with so many changed tokens."""
    report.rows_changed += 1
    report.tokens_changed += tokens
    tables: Iterable[tuple[dict[Any, tuple[int, int]], Any]] = (
        (report.by_step, step),
        (report.by_source, source),
    )
    for table, key in tables:
        before = table.get(key, (0, 0))
        table[key] = (before[0] + 1, before[1] + tokens)


def replaced(row: ServedRow, notes: Sequence[Notes]) -> NDArray[np.bool_]:
    """Which tokens of an unchanged row interventions replaced, (n,)."""
    gone = np.zeros(len(row.tokens), np.bool_)
    for noted in notes:
        # An edit's places are those of the row that its intervention was given.
        origin = noted.before.moved(np.arange(len(gone)))
        for _, edit in noted.edits:
            places = origin[edit.start : edit.stop]
            if not edit.growth:
                old = noted.before.tokens[edit.start : edit.stop]
                places = places[old != edit.ids]
            gone[places] = True
    return gone


def examples_of(
    noted: Notes, changes: Interventions, source: int, place: int, where: str
) -> list[Example]:
    """What one intervention did to a row."""
    step, row = changes.sizes.step_of(place)
    name = changes.facts.names[source]
    return [
        Example(step, row, name, span.document, where, edit.old_text, edit.new_text)
        for span, edit in noted.edits
    ]
