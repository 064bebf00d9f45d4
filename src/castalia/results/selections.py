"""Names of parts of results tables: a suite, a model, a step of it, a run, a store."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError, nearest
from castalia.results.query import Source, select, select_table
from castalia.results.schema import COLUMNS, KEY
from castalia.results.store import ResultsStore, find_stores, source_of

STEP = re.compile(r"(.+)@(?:step)?(\d+|last)", re.DOTALL)
LAST = "last"
KEPT = (*KEY, "value", "stderr", "higher_is_better")
"""Columns of a selection."""


class Selection(NamedTuple):
    """Rows of a table, and what they were called."""

    name: str
    table: Any
    """KEPT of the rows, as a pyarrow.Table."""


class Condition(NamedTuple):
    """A condition of SQL with values for its question marks."""

    sql: str = "TRUE"
    values: tuple[Any, ...] = ()

    def also(self, sql: str, *values: Any) -> "Condition":
        """Both conditions."""
        return Condition(f"{self.sql} AND {sql}", (*self.values, *values))


def select_rows(text: str, stores: Sequence[ResultsStore], where: str | None = None) -> Selection:
    """The rows that a name means: NAME[@STEP][,COLUMN=VALUE...].

    text   NAME is SUITE, MODEL, SUITE/MODEL, or a path as in `find_stores`; STEP a number or
           `last`; such as pythia-v1/pythia-70m@143000,shots=5.
    where  a condition of SQL that holds for all.
    Raises  DataError for an unknown name, with the nearest, one that means several models, or a
            selection without rows.
    """
    name, step, settings = parsed(text)
    source = None
    condition = None
    if stores:
        source = source_of(stores)
        condition = condition_of(name, source)
    # A name of the tables comes before a path of the same name.
    if source is None or condition is None:
        source, condition = rows_of_path(name, source)
    for column, value in settings.items():
        # `COLUMN=` without a value means NULL, which `=` would never match.
        condition = condition.also(f"CAST({column} AS TEXT) IS NOT DISTINCT FROM ?", value or None)
    if where is not None:
        # Lines of their own, so that a comment at the end of `where` does not hide the bracket.
        condition = condition.also(f"(\n{where}\n)")
    rows = filtered(source, condition)
    found = rows
    # Last, since the last step is that of the rows which all other conditions leave.
    if step == LAST:
        found = filtered(Source(rows), Condition().also("step = (SELECT max(step) FROM results)"))
    elif step is not None:
        found = filtered(
            Source(rows), Condition().also("step = (SELECT CAST(? AS BIGINT))", int(step))
        )
    if not len(found):
        raise DataError(f"{text}: no such rows{steps_of(rows)}")
    if "variant" not in settings:
        found = themselves(found)
    return Selection(text, found)


def parsed(text: str) -> tuple[str, str | None, dict[str, str]]:
    """(NAME, STEP, column -> value) of the text of a selection.

    Raises  DataError for a column that results do not have.
    """
    name, *pairs = text.split(",")
    if not all("=" in pair for pair in pairs):
        # The commas are of a path.
        return text, None, {}
    settings = {}
    for pair in pairs:
        column, _, value = pair.partition("=")
        if column not in COLUMNS:
            raise DataError(
                f"{text}: results have no column {column!r}{nearest(column, COLUMNS)}; have:"
                f" {', '.join(COLUMNS)}"
            )
        settings[column] = value
    match = STEP.fullmatch(name)
    if match is None:
        return name, None, settings
    return match[1], match[2], settings


def condition_of(name: str, source: Source) -> Condition | None:
    """The condition that selects a suite, a model or SUITE/MODEL of a table; None if it has none.

    Raises  DataError for a model of several suites.
    """
    models = select(source, "SELECT DISTINCT suite, model FROM results ORDER BY ALL")[1]
    if any(suite == name for suite, _ in models):
        return Condition().also("suite = ?", name)
    same = [(suite, model) for suite, model in models if name in (model, f"{suite}/{model}")]
    if len(same) > 1:
        choices = ", ".join(f"{suite}/{model}" for suite, model in same)
        raise DataError(f"{name} is a model of several suites; name one: {choices}")
    if not same:
        return None
    ((suite, model),) = same
    return condition_of_model(suite, model)


def condition_of_model(suite: str, model: str) -> Condition:
    """The rows of one model of one suite."""
    return Condition().also("suite = ?", suite).also("model = ?", model)


def rows_of_path(name: str, source: Source | None) -> tuple[Source, Condition]:
    """The table that a path means, and the condition that selects the run of the path in it.

    source  where the name was not found, for the hint.
    Raises  DataError if it is no path.
    """
    path = Path(name)
    if not path.exists():
        names = set()
        if source is not None:
            for suite, model in select(source, "SELECT DISTINCT suite, model FROM results")[1]:
                names |= {suite, model, f"{suite}/{model}"}
        menu = "; --store DIR names a table"
        if names:
            # A table of the whole hub has thousands of names; twenty fit on a screen.
            menu = f"; have: {', '.join(sorted(names)[:20])}"
        raise DataError(f"no suite, model or store {name!r}{nearest(name, names) or menu}")
    there = source_of(find_stores(path))
    place = path.resolve()
    # Evaluations of a run are labelled by its two last folders; any other path means its table.
    run = condition_of_model(place.parent.name, place.name)
    if len(filtered(there, run)):
        return there, run
    return there, Condition()


def filtered(source: Source, condition: Condition) -> Any:
    """KEPT of the rows for which a condition holds, as a pyarrow.Table."""
    columns = ", ".join(KEPT)
    return select_table(
        source, f"SELECT {columns} FROM results WHERE {condition.sql}", condition.values
    )


def themselves(rows: Any) -> Any:
    """The rows of the models themselves, without variants, if there are such and one model only."""
    models = select(Source(rows), "SELECT count(DISTINCT (suite, model)) FROM results")[1][0][0]
    found = filtered(Source(rows), Condition().also("variant = ''"))
    # Of several models one may have variants alone, and would be lost.
    if models == 1 and len(found):
        return found
    return rows


def steps_of(rows: Any) -> str:
    """The steps that there are, for the error about one that is not."""
    if not len(rows):
        return ""
    answer = select(
        Source(rows), "SELECT DISTINCT step FROM results WHERE step IS NOT NULL ORDER BY 1"
    )
    steps = [str(row[0]) for row in answer[1]]
    if not steps:
        return "; they have no step"
    # Pythia has 154 steps; thirty show the grid.
    if len(steps) > 30:
        steps = [*steps[:30], "…"]
    return f"; there are the steps {', '.join(steps)}"
