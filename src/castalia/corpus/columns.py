"""Texts from Parquet and Arrow files: string columns, a few rows in memory at a time.

A *row* here is the file format's word: one document with its metadata.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from castalia.core.errors import DataError, nearest
from castalia.core.extras import require
from castalia.corpus.inputs import InputFile

ROWS_AT_A_TIME = 1024
"""Rows turned into Python objects at a time; bounds the memory whatever the row groups' size."""


@contextmanager
def reading(path: str) -> Iterator[Any]:
    """pyarrow, whose errors about a file become DataErrors.

    Raises  ConfigError if pyarrow is not installed.
    """
    pyarrow = require("pyarrow", "parquet", f"reading {path}")
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # UnicodeDecodeError comes from the name of a column.
        raise DataError(f"{path}: cannot be read: {error}") from error


def parquet_spans(file: InputFile, part_bytes: int) -> list[tuple[int, int, int]]:
    """Ranges of row groups [start, stop) of about `part_bytes` bytes of text, with their bytes."""
    with parquet_file(file) as parquet:
        metadata = parquet.metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    return grouped(sizes, part_bytes)


def arrow_spans(file: InputFile, part_bytes: int) -> list[tuple[int, int, int]]:
    """Ranges of batches [start, stop) of about `part_bytes` bytes, with their bytes."""
    with arrow_batches(file) as (_, batches):
        return grouped([batch.nbytes for batch in batches], part_bytes)


def rows_before(file: InputFile, file_format: str, start: int) -> int:
    """Number of rows before row group or batch `start`."""
    if file_format == "arrow":
        with arrow_batches(file) as (_, batches):
            return sum(batch.num_rows for batch, _ in zip(batches, range(start), strict=False))
    with parquet_file(file) as parquet:
        return sum(parquet.metadata.row_group(i).num_rows for i in range(start))


def grouped(sizes: Sequence[int], part_bytes: int) -> list[tuple[int, int, int]]:
    """Neighbours of about `part_bytes` together, as (start, stop, bytes).

    A file without row groups is one empty group, so that it still counts as read.
    """
    groups: list[tuple[int, int, int]] = []
    start = 0
    group_bytes = 0
    for i, size in enumerate(sizes):
        if i > start and group_bytes + size > part_bytes:
            groups.append((start, i, group_bytes))
            start = i
            group_bytes = 0
        group_bytes += size
    groups.append((start, len(sizes), group_bytes))
    return groups


@contextmanager
def parquet_file(file: InputFile) -> Iterator[Any]:
    """An open Parquet file; pages are checked against their checksums where they have one."""
    parquet = require("pyarrow.parquet", "parquet", f"reading {file.path}")
    with (
        reading(file.path) as pyarrow,
        file.open() as raw,
        # Arrow's threads would need Python's lock to read a file object of Python's: one that still
        # waits for it when the process ends aborts the process.
        pyarrow.PythonFile(raw) if file.remote else pyarrow.OSFile(file.path) as opened,
        parquet.ParquetFile(opened, page_checksum_verification=True) as parquet_file,
    ):
        yield parquet_file


@contextmanager
def arrow_batches(file: InputFile) -> Iterator[tuple[Any, Any]]:
    """Schema and batches of an Arrow file, in `datasets`' stream format or in the file format."""
    with reading(file.path) as pyarrow, file.open() as raw:
        opened = pyarrow.PythonFile(raw) if file.remote else pyarrow.memory_map(file.path)
        with opened:
            # Only the file format begins with this mark; the file name does not tell.
            is_file_format = opened.read(6) == b"ARROW1"
            opened.seek(0)
            if is_file_format:
                reader = pyarrow.ipc.open_file(opened)
                yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(opened)
                yield reader.schema, reader


def column_rows(
    file: InputFile, file_format: str, start: int, stop: int, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of row groups or batches [start, stop), with those columns of `names` that exist.

    Raises  DataError if the file is damaged.
    """
    source = parquet_batches if file_format == "parquet" else sliced_batches
    try:
        for batch in source(file, start, stop, names):
            # Whole columns become Python lists at once: a call for each value is ten times slower.
            columns = {
                name: batch.column(i).to_pylist() for i, name in enumerate(batch.schema.names)
            }
            for row in range(batch.num_rows):
                yield {name: values[row] for name, values in columns.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: not UTF-8: {error}") from None


def parquet_batches(file: InputFile, start: int, stop: int, names: Sequence[str]) -> Iterator[Any]:
    """Batches of Parquet row groups [start, stop)."""
    with parquet_file(file) as parquet:
        existing = [name for name in dict.fromkeys(names) if name in parquet.schema_arrow.names]
        # One thread: every worker process has a core of its own.
        yield from parquet.iter_batches(
            ROWS_AT_A_TIME, row_groups=range(start, stop), columns=existing, use_threads=False
        )


def sliced_batches(file: InputFile, start: int, stop: int, names: Sequence[str]) -> Iterator[Any]:
    """Batches [start, stop) of an Arrow file, ROWS_AT_A_TIME rows at a time."""
    with arrow_batches(file) as (schema, batches):
        existing = [name for name in dict.fromkeys(names) if name in schema.names]
        for i, batch in enumerate(batches):
            if i >= stop:
                return
            if i < start:  # a stream has no index: earlier batches are read and dropped
                continue
            for first in range(0, batch.num_rows, ROWS_AT_A_TIME):
                rows = batch.slice(first, ROWS_AT_A_TIME)
                rows.validate(full=True)  # a damaged offset would read foreign memory
                yield rows.select(existing)


def check_columns(
    file: InputFile, file_format: str, keys: Sequence[str], text_keys: Sequence[str]
) -> None:
    """Require the columns `keys`, each once; those of `text_keys` must hold strings.

    Raises  DataError naming the columns that exist.
    """
    with reading(file.path) as pyarrow:
        schema = schema_of(file, file_format)
        strings = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
        for key in keys:
            count = schema.names.count(key)
            if count == 0:
                existing = ", ".join(sorted(schema.names)) or "none"
                raise DataError(
                    f"{file.path}: unknown column {key!r}; columns: {existing}; choose one with"
                    f" --key{nearest(key, schema.names)}"
                )
            if count > 1:
                raise DataError(
                    f"{file.path}: {count} columns are named {key!r}; give each its own name"
                )
            kind = schema.field(key).type
            if pyarrow.types.is_dictionary(kind):  # each distinct string stored once
                kind = kind.value_type
            if key in text_keys and kind not in strings:
                raise DataError(f"{file.path}: column {key!r} must hold strings, got {kind}")


def schema_of(file: InputFile, file_format: str) -> Any:
    """The Arrow schema of a Parquet or Arrow file."""
    if file_format == "arrow":
        with arrow_batches(file) as (schema, _):
            return schema
    with parquet_file(file) as parquet:
        return parquet.schema_arrow
