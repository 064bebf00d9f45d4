"""The results table on disk: one Parquet file, which DuckDB reads."""

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write, claimed
from castalia.results.query import EXTRA, PURPOSE, Answer, select
from castalia.results.schema import COLUMNS, KEY, Result

FILE = "results.parquet"
SUFFIX = ".parquet"
EVALS = "evals"
"""Folder of a run or a suite that holds its store."""


class ResultsStore:
    """A folder with `results.parquet`, or another .parquet file; without the file, the table is
    empty."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        place = Path(folder)
        is_file = place.suffix == SUFFIX
        self.folder = place.parent if is_file else place
        self.path = place if is_file else place / FILE

    def __repr__(self) -> str:
        return f"ResultsStore({str(self.path)!r})"

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
        return select(self.table(), sql, values)


def find_stores(path: str | os.PathLike[str]) -> list[ResultsStore]:
    """The stores that a path names: a table's file or its folder, a run, or a suite's folder.

    A suite has the store of its own sweeps and those of its runs.
    Raises  DataError if there is none.
    """
    place = Path(path)
    if place.is_file():
        return [ResultsStore(place)]
    folders = [place, place / EVALS, *sorted(place.glob(f"*/{EVALS}"))]
    stores = [ResultsStore(folder) for folder in folders if (folder / FILE).is_file()]
    if not stores:
        raise DataError(
            f"{place}: no results here: expected a folder with {FILE}, a run or suite with"
            f" {EVALS}/{FILE}, or such a file; castalia results --import FILES --store {place}"
            " makes one"
        )
    return stores


def read_stores(stores: Sequence[ResultsStore]) -> Any:
    """The tables of several stores as one pyarrow.Table; the newest row of each KEY stands.

    Raises  DataError if a file is damaged.
    """
    table = stores[0].table()
    for store in stores[1:]:
        table = newest(table, store.table())
    return table


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
