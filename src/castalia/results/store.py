"""The results table on disk: one Parquet file, which DuckDB reads."""

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write, claimed
from castalia.results.schema import COLUMNS, KEY, Result

FILE = "results.parquet"
EXTRA = "results"
PURPOSE = "the results table"


Answer = tuple[list[str], list[tuple[Any, ...]]]
"""Names of columns, and rows."""


class ResultsStore:
    """A folder with `results.parquet`; without the file, the table is empty."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE

    def __repr__(self) -> str:
        return f"ResultsStore({str(self.folder)!r})"

    def add(self, results: Iterable[Result]) -> int:
        """Add rows; a row replaces the older one of the same KEY. Atomic, also between processes.

        Returns  the number of rows in the table.
        Raises   DataError if the file is damaged: it stays as it is; CastaliaError if the folder
                 cannot be written.
        """
        new = table_of(list(results))
        with claimed(self.folder):
            whole = newest(self.table(), new)
            parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
            with atomic_write(self.path, "wb") as file:
                # Checksums: a flipped bit is an error when the file is read, never a number.
                parquet.write_table(whole, file, compression="zstd", write_page_checksum=True)
        return int(whole.num_rows)

    def table(self) -> Any:
        """The table as a pyarrow.Table.

        Raises  DataError if the file is damaged or is no results table.
        """
        if not self.path.exists():
            return table_of([])
        parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
        try:
            table = parquet.read_table(
                self.path, page_checksum_verification=True, partitioning=None
            )
        # pyarrow's errors are ValueError, OSError and its own, by the kind of damage.
        except Exception as error:
            raise DataError(
                f"{self.path} cannot be read as Parquet: {first_line(error)}; move it away, then"
                " import or evaluate again"
            ) from None
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(
                f"{self.path} is no results table: it lacks the columns {', '.join(missing)}"
            )
        return table.select(list(COLUMNS)).cast(arrow_schema())

    def query(self, sql: str, values: Sequence[Any] = ()) -> Answer:
        """The names of the columns and the rows that a SELECT over the table `results` gives.

        values  for the question marks in it.
        Raises  DataError for a damaged file, or SQL that DuckDB refuses.
        """
        duckdb = require("duckdb", EXTRA, PURPOSE)
        table = self.table()
        with duckdb.connect() as connection:
            connection.register("results", table)
            try:
                answer = connection.execute(sql, list(values))
                if answer.description is None:
                    return [], []
                return [column[0] for column in answer.description], answer.fetchall()
            except duckdb.Error as error:
                raise DataError(f"--sql: {error}") from None


def table_of(results: Sequence[Result]) -> Any:
    """Rows as a pyarrow.Table."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    columns = {name: [getattr(row, name) for row in results] for name in COLUMNS}
    return arrow.table(columns, schema=arrow_schema())


def arrow_schema() -> Any:
    """COLUMNS as a pyarrow.Schema."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    kinds = {
        "TEXT": arrow.string(),
        "BIGINT": arrow.int64(),
        "INTEGER": arrow.int32(),
        "DOUBLE": arrow.float64(),
        "BOOLEAN": arrow.bool_(),
        "TIMESTAMP": arrow.timestamp("us"),
    }
    return arrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])


def newest(old: Any, new: Any) -> Any:
    """Both tables as one; of rows with the same KEY the latest stands, of equal times the new."""
    duckdb = require("duckdb", EXTRA, PURPOSE)
    names = ", ".join(COLUMNS)
    with duckdb.connect() as connection:
        connection.register("old", old)
        connection.register("new", new)
        answer = connection.sql(
            f"SELECT {names} FROM (SELECT *, 0 AS part FROM old UNION ALL SELECT *, 1 FROM new)"
            f" QUALIFY row_number() OVER (PARTITION BY {', '.join(KEY)}"
            " ORDER BY evaluated_at DESC NULLS LAST, part DESC) = 1"
            f" ORDER BY {', '.join(KEY)}"
        )
        return answer.to_arrow_table().cast(arrow_schema())


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def now() -> datetime:
    """The time for `evaluated_at`."""
    return datetime.now(UTC).replace(tzinfo=None)
