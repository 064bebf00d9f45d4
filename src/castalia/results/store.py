"""The results table on disk: one Parquet file, which DuckDB reads."""

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write, claimed
from castalia.results.query import EXTRA, PURPOSE, Answer, Source, select
from castalia.results.schema import COLUMNS, EVALS, KEY, Result

FILE = "results.parquet"
SUFFIX = ".parquet"
REQUIRED = ("suite", "model", "task", "metric", "value")
"""Columns of every results table, of any version."""
NEAR = ("model", "step", "task")
"""Columns that tell the rows that new ones may replace from all others."""
SILENT_SECONDS = 5.0
"""Wait for another process that adds before it is said."""


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

        Nothing is written if the table has the very rows.
        Returns  the number of rows in the table.
        Raises   DataError if the file is damaged: it stays as it is; CastaliaError if the folder
                 cannot be written.
        """
        return self.merge(table_of(list(results)))

    def merge(self, new: Any) -> int:
        """Add the rows of a pyarrow.Table with our columns, as `add` does."""
        # Workers of a sweep add every few seconds; that one waits for another is no news.
        with claimed(self.folder, silent=SILENT_SECONDS):
            old = self.contents()
            whole = merged(old, new)
            if whole is None:
                return int(old.num_rows)
            # Those of processes that were killed while they held the claim.
            for stray in self.folder.glob(f".{self.path.name}.*.tmp"):
                stray.unlink(missing_ok=True)
            parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
            with atomic_write(self.path, "wb") as file:
                # Checksums: a flipped bit is an error when the file is read, never a number.
                # Without Arrow's own schema in it, which has the dictionaries as types.
                parquet.write_table(
                    whole,
                    file,
                    compression="zstd",
                    write_page_checksum=True,
                    store_schema=False,
                    write_statistics=list(NEAR),
                )
        return int(whole.num_rows)

    def require_writable(self) -> None:
        """Find out that rows cannot be added before they are computed.

        Raises  DataError if the file is damaged, and CastaliaError if the folder cannot be written.
        """
        with claimed(self.folder, silent=SILENT_SECONDS):
            self.contents()

    def table(self) -> Any:
        """The table as a pyarrow.Table.

        Raises  DataError if the file is damaged or is no results table.
        """
        arrow = require("pyarrow", EXTRA, PURPOSE)
        table = self.contents().select(list(COLUMNS))
        try:
            return table.cast(arrow_schema())
        # Texts whose places a flipped bit led out of their dictionary.
        except arrow.ArrowException as error:
            raise self.damage(error) from None

    def contents(self) -> Any:
        """The table as it is written: texts as dictionaries, and with columns of later versions.

        Columns that earlier versions did not write are filled with their defaults.
        """
        if not self.path.exists():
            return table_of([])
        parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
        try:
            table = parquet.read_table(
                self.path,
                page_checksum_verification=True,
                partitioning=None,
                # A few names in a million rows: a third of the memory and of the time.
                read_dictionary=[name for name, kind in COLUMNS.items() if kind == "TEXT"],
            )
        # pyarrow's errors are ValueError, OSError and its own, by the kind of damage.
        except Exception as error:
            raise self.damage(error) from None
        return self.completed(table)

    def completed(self, table: Any) -> Any:
        """A table that was read, with all columns, ours first."""
        missing = [name for name in REQUIRED if name not in table.column_names]
        if missing:
            raise DataError(
                f"{self.path} is no results table: it lacks the columns {', '.join(missing)}"
            )
        arrow = require("pyarrow", EXTRA, PURPOSE)
        columns = {}
        for field in arrow_schema():
            default = Result._field_defaults.get(field.name)
            if field.name not in table.column_names:
                columns[field.name] = arrow.repeat(arrow.scalar(default, field.type), len(table))
                continue
            column = table[field.name]
            if not arrow.types.is_dictionary(column.type):
                try:
                    column = column.cast(field.type)
                except ValueError as error:
                    raise DataError(
                        f"{self.path}: column {field.name}: expected {field.type}, got"
                        f" {column.type}: {first_line(error)}"
                    ) from None
            columns[field.name] = column
        later = [name for name in table.column_names if name not in COLUMNS]
        return arrow.table(columns | {name: table[name] for name in later})

    def scan(self) -> Any:
        """A pyarrow.dataset.Dataset, of which a query reads only the columns that it names; or a
        pyarrow.Table, where the file has other columns than ours.

        Raises  DataError if the file cannot be opened as Parquet. Damage in the numbers themselves
                shows when they are read.
        """
        if not self.path.exists():
            return table_of([])
        arrow = require("pyarrow", EXTRA, PURPOSE)
        dataset = require("pyarrow.dataset", EXTRA, PURPOSE)
        checks = dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
        form = dataset.ParquetFileFormat(default_fragment_scan_options=checks)
        try:
            # One reading of the file: an `add` that replaces it between two readings of a query
            # must not mix two tables.
            fragment = form.make_fragment(arrow.py_buffer(self.path.read_bytes()))
            schema = fragment.physical_schema
        except Exception as error:
            raise self.damage(error) from None
        if not schema.equals(arrow_schema()):
            return self.table()
        return dataset.FileSystemDataset([fragment], schema, form)

    def damage(self, error: Exception) -> DataError:
        """The error about a file that is no Parquet."""
        return DataError(
            f"{self.path} cannot be read as Parquet: {first_line(error)}; move it away, then"
            " import or evaluate again"
        )

    def source(self) -> Source:
        """The table for `select` and `select_table`.

        Raises  DataError if the file cannot be opened as Parquet.
        """
        return Source(self.scan(), self.table)

    def query(self, sql: str, values: Sequence[Any] = ()) -> Answer:
        """The names of the columns and the rows that a SELECT over the table `results` gives.

        values  for the question marks in it.
        Raises  DataError for a damaged file, or SQL that DuckDB refuses.
        """
        return select(self.source(), sql, values)


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


def source_of(stores: Sequence[ResultsStore]) -> Source:
    """The tables of several stores for `select`, as `read_stores` joins them."""
    if len(stores) == 1:
        return stores[0].source()
    return Source(read_stores(stores))


def query_stores(stores: Sequence[ResultsStore], sql: str) -> Answer:
    """What a SELECT over the tables of several stores gives, as `ResultsStore.query`."""
    return select(source_of(stores), sql)


def table_of(results: Sequence[Result]) -> Any:
    """Rows as a pyarrow.Table."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    schema = arrow_schema()
    # zip of no rows would give no columns.
    if not results:
        return schema.empty_table()
    by_name = dict(zip(Result._fields, zip(*results, strict=True), strict=True))
    return arrow.table({name: by_name[name] for name in COLUMNS}, schema=schema)


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


def merged(old: Any, new: Any) -> Any | None:
    """The rows of both tables, with the columns of `old`; None if they are those of `old`.

    Of rows with the same KEY the latest stands, of equal times the new.
    """
    arrow = require("pyarrow", EXTRA, PURPOSE)
    compute = require("pyarrow.compute", EXTRA, PURPOSE)
    # Most of a large table has nothing to do with a few new rows, and three columns tell it: a
    # task of one checkpoint is added to a million rows in the time that writing them takes.
    near = arrow.repeat(True, len(old))
    for name in NEAR:
        near = compute.and_(near, compute.is_in(old[name], value_set=compute.unique(new[name])))
    touched = decoded(old.filter(near))
    both = arrow.concat_tables([touched, new], promote_options="default")
    kept = both.take(latest_rows(both))
    if kept.equals(touched):
        return None
    rest = old
    # A filter copies the table, which costs as much as reading it.
    if len(touched):
        rest = old.filter(compute.invert(near))
    whole = arrow.concat_tables([encoded(rest), encoded(kept)], promote_options="default")
    # The writer encodes a column only once if its parts have one dictionary.
    return whole.unify_dictionaries()


def newest(old: Any, new: Any) -> Any:
    """Both tables as one; of rows with the same KEY the latest stands, of equal times the new."""
    whole = merged(old, new)
    if whole is None:
        return old
    return decoded(whole)


def latest_rows(table: Any) -> Any:
    """The places of the rows that stand, in the order in which their keys come first."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    duckdb = require("duckdb", EXTRA, PURPOSE)
    rows = table.select([*KEY, "evaluated_at"])
    rows = rows.append_column("place", arrow.array(range(len(table)), arrow.int64()))
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        # By hash: sorting a million rows by sixteen columns takes a hundred times as long.
        when = "coalesce(evaluated_at, TIMESTAMP '-infinity')"
        answer = connection.sql(
            f"SELECT max({{moment: {when}, place: place}}).place AS place FROM rows"
            f" GROUP BY {', '.join(KEY)} ORDER BY min(place)"
        )
        return answer.to_arrow_table()["place"].combine_chunks()


def texts(table: Any) -> list[str]:
    """The columns of text, of ours."""
    return [name for name in table.column_names if COLUMNS.get(name) == "TEXT"]


def encoded(table: Any) -> Any:
    """A table with its texts as dictionaries."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    return with_types(table, arrow.dictionary(arrow.int32(), arrow.string()))


def decoded(table: Any) -> Any:
    """A table with its texts as texts."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    return with_types(table, arrow.string())


def with_types(table: Any, kind: Any) -> Any:
    """A table with its texts as `kind`."""
    schema = table.schema
    for name in texts(table):
        place = schema.get_field_index(name)
        schema = schema.set(place, schema.field(place).with_type(kind))
    return table.cast(schema)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def now() -> datetime:
    """The time for `evaluated_at`."""
    return datetime.now(UTC).replace(tzinfo=None)
