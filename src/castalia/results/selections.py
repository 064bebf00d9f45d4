"""Names of parts of results tables: a suite, a model, a step of it, a run, a store."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError, nearest
from castalia.results.query import select, select_table
from castalia.results.schema import COLUMNS
from castalia.results.store import ResultsStore, find_stores, read_stores

STEP = re.compile(r"(.+)@(?:step)?(\d+|last)", re.DOTALL)
LAST = "last"


class Selection(NamedTuple):
    """Rows of a table, and what they were called."""

    name: str
    table: Any
    """The rows, as a pyarrow.Table."""


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
    table = read_stores(stores) if stores else None
    condition = None if table is None else condition_of(name, table)
    if condition is None:
        table, condition = rows_of_path(name, table)
    for column, value in settings.items():
        condition = condition.also(f"CAST({column} AS TEXT) IS NOT DISTINCT FROM ?", value or None)
    if where is not None:
        condition = condition.also(f"(\n{where}\n)")
    rows = filtered(table, condition)
    found = rows
    if step is not None:
        wanted = "max(step) FROM results" if step == LAST else "CAST(? AS BIGINT)"
        values = () if step == LAST else (int(step),)
        found = filtered(rows, Condition().also(f"step = (SELECT {wanted})", *values))
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
    return (name, None, settings) if match is None else (match[1], match[2], settings)


def condition_of(name: str, table: Any) -> Condition | None:
    """The condition that selects a suite, a model or SUITE/MODEL of a table; None if it has none.

    Raises  DataError for a model of several suites.
    """
    models = select(table, "SELECT DISTINCT suite, model FROM results ORDER BY ALL")[1]
    if any(suite == name for suite, _ in models):
        return Condition().also("suite = ?", name)
    same = [(suite, model) for suite, model in models if name in (model, f"{suite}/{model}")]
    if len(same) > 1:
        choices = ", ".join(f"{suite}/{model}" for suite, model in same)
        raise DataError(f"{name} is a model of several suites; name one: {choices}")
    return Condition().also("suite = ?", same[0][0]).also("model = ?", same[0][1]) if same else None


def rows_of_path(name: str, table: Any | None) -> tuple[Any, Condition]:
    """The table that a path means, and the condition that selects the run of the path in it.

    table  where the name was not found, for the hint.
    Raises  DataError if it is no path.
    """
    path = Path(name)
    if not path.exists():
        names = set()
        if table is not None:
            for suite, model in select(table, "SELECT DISTINCT suite, model FROM results")[1]:
                names |= {suite, model, f"{suite}/{model}"}
        menu = (
            f"; have: {', '.join(sorted(names)[:20])}" if names else "; --store DIR names a table"
        )
        raise DataError(f"no suite, model or store {name!r}{nearest(name, names) or menu}")
    table = read_stores(find_stores(path))
    place = path.resolve()
    run = Condition().also("suite = ?", place.parent.name).also("model = ?", place.name)
    return table, run if len(filtered(table, run)) else Condition()


def filtered(table: Any, condition: Condition) -> Any:
    """The rows for which a condition holds."""
    return select_table(table, f"SELECT * FROM results WHERE {condition.sql}", condition.values)


def themselves(table: Any) -> Any:
    """The rows of the models themselves, without variants, if there are such and one model only."""
    plain = Condition().also("variant = ''")
    models = select(table, "SELECT count(DISTINCT (suite, model)) FROM results")[1][0][0]
    found = filtered(table, plain)
    return found if models == 1 and len(found) else table


def steps_of(rows: Any) -> str:
    """The steps that there are, for the error about one that is not."""
    if not len(rows):
        return ""
    answer = select(rows, "SELECT DISTINCT step FROM results WHERE step IS NOT NULL ORDER BY 1")
    steps = [str(row[0]) for row in answer[1]]
    if not steps:
        return "; they have no step"
    return f"; there are the steps {', '.join(steps[:30])}{', …' if len(steps) > 30 else ''}"
