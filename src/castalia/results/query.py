"""SQL over a results table: DuckDB, without access to files, settings or other tables."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.extras import require

EXTRA = "results"
PURPOSE = "the results table"
READING = ("SELECT", "EXPLAIN", "MULTI")
"""Kinds of statements that are answered. MULTI is PIVOT, which DuckDB runs in several parts."""

Answer = tuple[list[str], list[tuple[Any, ...]]]
"""Names of columns, and rows."""


class Source(NamedTuple):
    """A table to ask."""

    data: Any
    """A pyarrow.Table or pyarrow.dataset.Dataset."""
    check: Callable[[], object] = tuple
    """Called where a query fails: it raises what is wrong with the data themselves, of which
    DuckDB's words are about its own scan."""


def select(source: Source, sql: str, values: Sequence[Any] = ()) -> Answer:
    """The names of the columns and the rows that one SELECT over the table `results` gives.

    values  for the question marks in it.
    Raises  DataError for SQL that is no query, or that DuckDB refuses.
    """
    with connected(source, sql) as connection:
        answer = connection.execute(sql, list(values))
        return [column[0] for column in answer.description], answer.fetchall()


def select_table(source: Source, sql: str, values: Sequence[Any] = ()) -> Any:
    """As `select`; the rows as a pyarrow.Table."""
    with connected(source, sql) as connection:
        return connection.sql(sql, params=list(values)).to_arrow_table()


@contextmanager
def connected(source: Source, sql: str) -> Iterator[Any]:
    """A connection of DuckDB that has the table `results` and may run `sql`.

    Raises  DataError for SQL that is no query; DuckDB's own errors become one, too.
    """
    duckdb = require("duckdb", EXTRA, PURPOSE)
    # No files, no extensions, no Python variables of callers; and no way to change that. Whoever
    # may read the table may not read the machine.
    settings = {"enable_external_access": "false", "python_enable_replacements": "false"}
    with duckdb.connect(config=settings) as connection:
        connection.register("results", source.data)
        connection.execute("SET lock_configuration = true")
        try:
            statements = connection.extract_statements(sql)
            kinds = [statement.type.name for statement in statements]
            if len(kinds) != 1 or kinds[0] not in READING:
                got = ", ".join(kinds) or "none"
                raise DataError(f"SQL: expected one SELECT, got {got}: {sql.strip()[:200]!r}")
            yield connection
        except (duckdb.Error, ValueError, OSError) as error:
            source.check()
            raise DataError(f"SQL: {error}") from None
