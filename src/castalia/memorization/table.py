"""The table of a scan, one Parquet file: a row for each checkpoint and row of the stream.

    step int64          steps behind the checkpoint's weights
    row int64           the row within its training step
    index int64         its place in the run's order
    prompt int32        tokens of the prompt
    continuation int32  tokens of the continuation
    score float32       share of the continuation that greedy decoding makes; null without scores
    exact bool          whether it makes all of it
    loss float32        mean loss of the continuation's tokens, in nats; null without losses

Row groups are shards, by step and index. The metadata of the file, key `castalia.memorization`,
says what was computed, as JSON.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write
from castalia.core.parquet_seal import parquet_fault, seal, with_place

EXTRA = "parquet"
PURPOSE = "castalia memorize"
KEY = b"castalia.memorization"
"""Where a file says what it is about, as JSON."""


def schema(metadata: Mapping[str, Any]) -> Any:
    """The columns, with metadata."""
    pyarrow = require("pyarrow", EXTRA, PURPOSE)
    columns = {
        "step": pyarrow.int64(),
        "row": pyarrow.int64(),
        "index": pyarrow.int64(),
        "prompt": pyarrow.int32(),
        "continuation": pyarrow.int32(),
        "score": pyarrow.float32(),
        "exact": pyarrow.bool_(),
        "loss": pyarrow.float32(),
    }
    described = {KEY: json.dumps(metadata).encode()}
    return with_place(pyarrow.schema(list(columns.items()), described))


def write_part(
    path: Path, columns: Mapping[str, np.ndarray | None], metadata: Mapping[str, Any]
) -> None:
    """Write one shard atomically; a column that is None is all null."""
    pyarrow = require("pyarrow", EXTRA, PURPOSE)
    fields = schema(metadata)
    count = next(len(values) for values in columns.values() if values is not None)
    arrays = []
    for field in fields:
        values = columns[field.name]
        made = pyarrow.nulls(count, field.type)
        arrays.append(made if values is None else pyarrow.array(values, field.type))
    table = pyarrow.Table.from_arrays(arrays, schema=fields)
    # Checksums: a flipped bit is an error when the file is read, never a number.
    with table_writer(path, fields) as writer:
        writer.write_table(table)


@contextmanager
def table_writer(path: Path, fields: Any) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetWriter; the file appears when the block ends, whole and sealed."""
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    with atomic_write(path, "wb") as file:
        options = {"compression": "zstd", "write_page_checksum": True}
        with parquet.ParquetWriter(file, fields, **options) as writer:
            yield writer
        seal(file)


class Scores:
    """A file of a scan, or one of its parts."""

    def __init__(self, path: Path) -> None:
        parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
        self.path = path
        try:
            if fault := parquet_fault(path):
                raise DataError(f"{path} is damaged: {fault}; delete it")
            self.file = parquet.ParquetFile(path, page_checksum_verification=True)
            self.metadata: dict[str, Any] = json.loads(self.file.schema_arrow.metadata[KEY])
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}; delete it") from None
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path} is not a file of castalia memorize; choose another --output"
            ) from None

    def groups(self, step: int) -> Iterator[Any]:
        """The row groups of a checkpoint, as tables."""
        place = self.file.schema_arrow.names.index("step")
        for number in range(self.file.num_row_groups):
            found = self.file.metadata.row_group(number).column(place).statistics
            if found is not None and found.min == step:
                yield self.file.read_row_group(number)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
