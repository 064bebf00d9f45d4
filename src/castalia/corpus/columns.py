"""Texts out of Parquet and Arrow files: string columns, a few rows in memory at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from castalia.core.errors import DataError, nearest
from castalia.core.extras import require
from castalia.corpus.inputs import InputFile

ROWS_AT_A_TIME = 1024


@contextmanager
def damage(path: str) -> Iterator[Any]:
    """pyarrow, whose errors about a file become ours.

    Raises  ConfigError if pyarrow is not installed.
    """
    pyarrow = require("pyarrow", "parquet", f"reading {path}")
    try:
        yield pyarrow
    except (
        pyarrow.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # the last about the name of a column
        raise DataError(f"{path}: cannot be read: {error}") from error


def parquet_spans(file: InputFile, part_bytes: int) -> list[tuple[int, int, int]]:
    """Row groups [start, stop) that belong together, and their bytes of text, about."""
    parquet = require("pyarrow.parquet", "parquet", f"reading {file.path}")
    with damage(file.path), file.open() as opened, parquet.ParquetFile(opened) as found:
        sizes = [found.metadata.row_group(i).total_byte_size for i in range(found.num_row_groups)]
    return grouped(sizes, part_bytes)


def arrow_spans(file: InputFile, part_bytes: int) -> list[tuple[int, int, int]]:
    """Batches [start, stop) that belong together, and their bytes."""
    with arrow_batches(file) as (_, batches):
        return grouped([batch.nbytes for batch in batches], part_bytes)


def rows_before(file: InputFile, form: str, start: int) -> int:
    """Rows of the file before row group or batch `start`."""
    if form == "arrow":
        with arrow_batches(file) as (_, batches):
            return sum(batch.num_rows for batch, _ in zip(batches, range(start), strict=False))
    parquet = require("pyarrow.parquet", "parquet", f"reading {file.path}")
    with damage(file.path), file.open() as opened, parquet.ParquetFile(opened) as found:
        return sum(found.metadata.row_group(i).num_rows for i in range(start))


def grouped(sizes: Sequence[int], part_bytes: int) -> list[tuple[int, int, int]]:
    """Neighbours of about `part_bytes` together; an empty file is one group of none."""
    found: list[tuple[int, int, int]] = []
    start = held = 0
    for i, size in enumerate(sizes):
        if i > start and held + size > part_bytes:
            found.append((start, i, held))
            start, held = i, 0
        held += size
    return [*found, (start, len(sizes), held)]


@contextmanager
def arrow_batches(file: InputFile) -> Iterator[tuple[Any, Any]]:
    """Schema and batches of an Arrow file, of the stream form that `datasets` writes or of the file form."""
    with damage(file.path) as pyarrow, file.open() as raw:
        opened = pyarrow.PythonFile(raw) if file.remote else pyarrow.memory_map(file.path)
        with opened:
            if opened.read(6) == b"ARROW1":
                opened.seek(0)
                reader = pyarrow.ipc.open_file(opened)
                yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                opened.seek(0)
                reader = pyarrow.ipc.open_stream(opened)
                yield reader.schema, reader


def column_rows(
    file: InputFile, form: str, start: int, stop: int, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of row groups or batches [start, stop), with the columns `names` that are there.

    Raises  DataError if the file is damaged.
    """
    source = parquet_batches if form == "parquet" else chosen_batches
    try:
        for batch in source(file, start, stop, names):
            columns = {
                name: batch.column(i).to_pylist() for i, name in enumerate(batch.schema.names)
            }
            for row in range(batch.num_rows):
                yield {name: values[row] for name, values in columns.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: not UTF-8 ({error})") from None


def parquet_batches(file: InputFile, start: int, stop: int, names: Sequence[str]) -> Iterator[Any]:
    """Batches of Parquet row groups."""
    parquet = require("pyarrow.parquet", "parquet", f"reading {file.path}")
    with (
        damage(file.path),
        file.open() as opened,
        parquet.ParquetFile(opened, page_checksum_verification=True) as found,
    ):
        have = [name for name in dict.fromkeys(names) if name in found.schema_arrow.names]
        groups = range(start, stop)
        yield from found.iter_batches(
            ROWS_AT_A_TIME, row_groups=groups, columns=have, use_threads=False
        )


def chosen_batches(file: InputFile, start: int, stop: int, names: Sequence[str]) -> Iterator[Any]:
    """Batches of an Arrow file, a few rows at a time."""
    with arrow_batches(file) as (schema, batches):
        have = [name for name in dict.fromkeys(names) if name in schema.names]
        for i, batch in enumerate(batches):
            if i >= stop:
                return
            for first in range(0, batch.num_rows if i >= start else 0, ROWS_AT_A_TIME):
                piece = batch.slice(first, ROWS_AT_A_TIME)
                piece.validate(full=True)
                yield piece.select(have)


def check_columns(file: InputFile, form: str, keys: Sequence[str], strings: Sequence[str]) -> None:
    """The file has the columns `keys`, each once, of which `strings` hold strings.

    Raises  DataError naming what it has.
    """
    with damage(file.path) as pyarrow:
        schema = schema_of(file, form)
        for key in keys:
            if key not in schema.names:
                have = ", ".join(sorted(schema.names)) or "no columns"
                close = nearest(key, schema.names)
                raise DataError(
                    f"{file.path}: no column {key!r}; have: {have}{close}; name the right one with --key"
                )
            if schema.names.count(key) > 1:
                count = schema.names.count(key)
                raise DataError(f"{file.path}: {count} columns {key!r}; give each its own name")
            kind = schema.field(key).type
            kind = (
                kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            )  # each different text stored once
            if key in strings and kind not in (
                pyarrow.string(),
                pyarrow.large_string(),
                pyarrow.string_view(),
            ):
                raise DataError(f"{file.path}: column {key!r} must hold strings, got {kind}")


def schema_of(file: InputFile, form: str) -> Any:
    """The Arrow schema of a Parquet or Arrow file."""
    if form == "arrow":
        with arrow_batches(file) as (schema, _):
            return schema
    parquet = require("pyarrow.parquet", "parquet", f"reading {file.path}")
    with file.open() as opened, parquet.ParquetFile(opened) as found:
        return found.schema_arrow
