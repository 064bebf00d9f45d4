"""`PREFIX.documents.parquet`: where each document of a token file came from."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.data.preparing.rows import Row

SUFFIX = ".documents.parquet"
GROUP_ROWS = 1 << 17
"""Documents a row group, so that the file does not depend on how the job was cut."""
HASH_BYTES = 16
OWN = ("source", "member", "line", "start", "stop", "tokens", "hash")
"""Columns that are ours; the id and the chosen metadata come after them."""


class DocumentColumns:
    """The rows of a part's documents, with the number of the piece in the place of the source."""

    def __init__(self, kept: Sequence[str]) -> None:
        self.kept = tuple(kept)
        self.values: dict[str, list[Any]] = {name: [] for name in ("piece", *OWN[2:], *kept)}

    def add(
        self,
        places: Sequence[int],
        rows: Sequence[Row],
        texts: Sequence[bytes],
        full: NDArray[np.bool_],
        sizes: NDArray[np.int64],
    ) -> None:
        """Append the rows whose text is not empty; `sizes` are theirs."""
        values, chosen = self.values, np.flatnonzero(full).tolist()
        values["piece"] += [places[i] for i in chosen]
        values["tokens"] += sizes.tolist()
        values["hash"] += [content_hash(texts[i]) for i in chosen]
        for i in chosen:
            row = rows[i]
            values["line"].append(row.line)
            values["start"].append(row.start)
            values["stop"].append(row.stop)
        for column, name in enumerate(self.kept):
            values[name] += [rows[i].kept[column] for i in chosen]

    def write(self, path: Path) -> None:
        """Write them as a file of the part."""
        pyarrow, parquet = arrow()
        kinds = {"piece": pyarrow.int32(), **number_kinds(pyarrow), **dict.fromkeys(self.kept, pyarrow.string())}
        for name in ("start", "stop"):  # rows of columns have no bytes of their own
            self.values[name] = [None if place < 0 else place for place in self.values[name]]
        table = pyarrow.table({name: pyarrow.array(found, kinds[name]) for name, found in self.values.items()})
        parquet.write_table(table, path, compression="none", use_dictionary=False)


def content_hash(text: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of a document's UTF-8."""
    return hashlib.sha256(text).digest()[:HASH_BYTES]


def arrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet.

    Raises  ConfigError if it is not installed.
    """
    purpose = "the index of documents"
    return require("pyarrow", "parquet", purpose), require("pyarrow.parquet", "parquet", purpose)


def number_kinds(pyarrow: Any) -> dict[str, Any]:
    """Types of our columns of numbers and hashes."""
    places = {name: pyarrow.int64() for name in ("line", "start", "stop")}
    return {**places, "tokens": pyarrow.int32(), "hash": pyarrow.binary(HASH_BYTES)}


def schema_of(pyarrow: Any, kept: Sequence[str]) -> Any:
    """The columns of the index."""
    names = {"source": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "member": pyarrow.string()}
    kinds = {**names, **number_kinds(pyarrow)}
    texts = dict.fromkeys(kept, pyarrow.string())
    return pyarrow.schema([(name, kinds[name]) for name in OWN] + list(texts.items()))


def placed(path: Path, sources: Sequence[tuple[str, str | None]], offsets: Sequence[int]) -> Any:
    """A part's documents as rows of the index: `sources` and lines before, one for each of its pieces."""
    pyarrow, parquet = arrow()
    table = parquet.read_table(path)
    piece = table.column("piece").to_numpy()
    line = table.column("line").to_numpy() + np.asarray(offsets, np.int64)[piece]
    found = table.drop_columns(["piece"])
    found = found.set_column(found.schema.get_field_index("line"), "line", pyarrow.array(line))
    names = pyarrow.array([name for name, _ in sources], pyarrow.string()).take(pyarrow.array(piece))
    members = pyarrow.array([member for _, member in sources], pyarrow.string()).take(pyarrow.array(piece))
    return found.add_column(0, "source", names).add_column(1, "member", members)


def write_index(path: str | Path, tables: Iterable[Any], kept: Sequence[str]) -> int:
    """Write tables one after the other in row groups of GROUP_ROWS; returns their rows."""
    pyarrow, parquet = arrow()
    schema, count = schema_of(pyarrow, kept), 0
    with parquet.ParquetWriter(str(path), schema, compression="zstd") as writer:
        for table in regrouped(pyarrow, tables):
            writer.write_table(table.cast(schema), row_group_size=GROUP_ROWS)
            count += table.num_rows
    return count


def regrouped(pyarrow: Any, tables: Iterable[Any]) -> Iterator[Any]:
    """The same rows in tables of GROUP_ROWS, the last one shorter."""
    held: list[Any] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= GROUP_ROWS:
            whole = pyarrow.concat_tables(held)
            yield whole.slice(0, GROUP_ROWS).combine_chunks()
            held, rows = [whole.slice(GROUP_ROWS)], rows - GROUP_ROWS
    if rows:
        yield pyarrow.concat_tables(held).combine_chunks()


def read_provenance(prefix: str, number: int) -> dict[str, Any] | None:
    """Where one document of a token file came from; None if the file has no index of documents, as foreign ones.

    Raises  DataError if the index is damaged or has no such document.
    """
    path = Path(prefix + SUFFIX)
    if not path.exists():
        return None
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number < rows:
                    (found,) = file.read_row_group(group).slice(number, 1).to_pylist()
                    return {**found, "hash": found["hash"].hex()}
                number -= rows
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it or prepare again") from None
    raise DataError(f"{path}: holds fewer documents than {prefix}.idx; remove it or prepare again")
