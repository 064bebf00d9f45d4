"""SQL over a results table: DuckDB, without access to files, settings or other tables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from castalia.core.errors import DataError
from castalia.core.extras import require

EXTRA = "results"
PURPOSE = "the results table"
READING = ("SELECT", "EXPLAIN", "MULTI")
"""Kinds of statements that are answered. MULTI is PIVOT, which DuckDB runs in several parts."""

Answer = tuple[list[str], list[tuple[Any, ...]]]
"""Names of columns, and rows."""


def select(table: Any, sql: str, values: Sequence[Any] = ()) -> Answer:
    """The names of the columns and the rows that one SELECT over the table `results` gives.

    table   a pyarrow.Table or pyarrow.dataset.Dataset.
    values  for the question marks in it.
    Raises  DataError for SQL that is no query, or that DuckDB refuses.
    """
    with connected(table, sql) as connection:
        answer = connection.execute(sql, list(values))
        return [column[0] for column in answer.description], answer.fetchall()


def select_table(table: Any, sql: str, values: Sequence[Any] = ()) -> Any:
    """As `select`; the rows as a pyarrow.Table."""
    with connected(table, sql) as connection:
        return connection.sql(sql, params=list(values)).to_arrow_table()


@contextmanager
def connected(table: Any, sql: str) -> Iterator[Any]:
    """A connection of DuckDB that has the table `results` and may run `sql`.

    Raises  DataError for SQL that is no query; DuckDB's own errors become one, too.
    """
    duckdb = require("duckdb", EXTRA, PURPOSE)
    # No files, no extensions, no Python variables of callers; and no way to change that. Whoever
    # may read the table may not read the machine.
    settings = {"enable_external_access": "false", "python_enable_replacements": "false"}
    with duckdb.connect(config=settings) as connection:
        connection.register("results", table)
        connection.execute("SET lock_configuration = true")
        try:
            statements = connection.extract_statements(sql)
            kinds = [statement.type.name for statement in statements]
            if len(kinds) != 1 or kinds[0] not in READING:
                got = ", ".join(kinds) or "none"
                raise DataError(f"SQL: expected one SELECT, got {got}: {sql.strip()[:200]!r}")
            yield connection
        except (duckdb.Error, ValueError, OSError) as error:
            raise DataError(f"SQL: {error}") from None
