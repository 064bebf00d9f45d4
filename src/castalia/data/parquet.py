"""Documents out of a Parquet file: one string column, a few rows in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError, nearest
from castalia.core.extras import require

ROWS_AT_A_TIME = 1024


def parquet_texts(path: Path, key: str) -> Iterator[str]:
    """The texts of column `key`, in order.

    Raises  ConfigError if pyarrow is not installed; DataError if the file is damaged, has no such column, or a row
            has no text in it.
    """
    pyarrow = require("pyarrow", "parquet", f"reading {path}")
    parquet = require("pyarrow.parquet", "parquet", f"reading {path}")
    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            check_column(pyarrow, file.schema_arrow, key, path)
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise DataError(f"{path}: row {number}: {key!r} must be a string, got null")
                    yield text
                    number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at or after row {number} ({error})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def check_column(pyarrow: Any, schema: Any, key: str, path: Path) -> None:
    """The file has one column `key`, of strings."""
    if key not in schema.names:
        have = ", ".join(sorted(schema.names)) or "no columns"
        raise DataError(
            f"{path}: no column {key!r}; have: {have}{nearest(key, schema.names)}; name the right one with --key"
        )
    if schema.names.count(key) > 1:
        raise DataError(f"{path}: {schema.names.count(key)} columns {key!r}; give each its own name")
    kind = schema.field(key).type
    if kind not in (pyarrow.string(), pyarrow.large_string()):
        raise DataError(f"{path}: column {key!r} must hold strings, got {kind}")
