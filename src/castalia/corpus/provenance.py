"""The document index, PREFIX.documents.parquet: the origin of each document of a token file."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.corpus.documents import Document

SUFFIX = ".documents.parquet"
REJECTS = ".rejects.jsonl"
"""Suffix of the rejected documents, with file and line."""
GROUP_ROWS = 1 << 17
"""Documents in a row group. Fixed, so that the file does not depend on how the job was cut."""
HASH_BYTES = 16
"""Bytes kept of a document's SHA-256."""
MOST_TEXT = 2**31 - 1
"""Bytes of text in one Arrow array, whose offsets are int32."""
OWN = ("source", "member", "line", "start", "stop", "tokens", "hash")
"""Columns of every index; the id and the chosen metadata follow them."""
PURPOSE = "the document index"


class DocumentColumns:
    """The index entries of a part's documents.

    The column `source` holds the number of the extent: file, member and line in the file are known
    only when parts are put together.
    """

    def __init__(self, metadata_names: Sequence[str]) -> None:
        self.metadata_names = tuple(metadata_names)
        own = ("source", *OWN[2:])
        self.values: dict[str, list[Any]] = {name: [] for name in (*own, *metadata_names)}

    def add(
        self,
        extents: Sequence[int],
        documents: Sequence[Document],
        texts: Sequence[bytes],
        has_tokens: NDArray[np.bool_],
        sizes: NDArray[np.int64],
    ) -> None:
        """Append the documents with tokens; `sizes` are theirs alone."""
        values = self.values
        chosen = np.flatnonzero(has_tokens).tolist()
        values["source"] += [extents[i] for i in chosen]
        values["tokens"] += sizes.tolist()
        values["hash"] += [content_hash(texts[i]) for i in chosen]
        for i in chosen:
            document = documents[i]
            values["line"].append(document.line)
            values["start"].append(document.start)
            values["stop"].append(document.stop)
        for column, name in enumerate(self.metadata_names):
            values[name] += [documents[i].metadata[column] for i in chosen]

    def write(self, path: Path) -> None:
        """Write the entries as a file of the part."""
        pyarrow, parquet = arrow()
        kinds = {
            "source": pyarrow.int32(),
            **number_kinds(pyarrow),
            **dict.fromkeys(self.metadata_names, pyarrow.string()),
        }
        arrays = [array_of(pyarrow, column, kinds[name]) for name, column in self.values.items()]
        table = pyarrow.Table.from_arrays(arrays, names=[*self.values])
        # Uncompressed: the file is read once, soon, and then deleted.
        parquet.write_table(table, path, compression="none", use_dictionary=False)


def array_of(pyarrow: Any, values: Sequence[Any], kind: Any) -> Any:
    """Numbers, texts or hashes as an Arrow array of `kind`; None and negative numbers are null.

    Equal to `pyarrow.array`, which first imports pandas if it is installed: a third of a second in
    each worker process.
    """
    buffers: list[Any]
    if pyarrow.types.is_integer(kind):
        numbers = np.asarray(values, kind.to_pandas_dtype())
        is_known = numbers >= 0
        buffers = [numbers]
    elif pyarrow.types.is_string(kind):
        is_known = np.array([value is not None for value in values], bool)
        texts = [(value or "").encode("utf-8") for value in values]
        if sum(map(len, texts)) > MOST_TEXT:
            return pyarrow.array(values, kind)  # in several chunks
        buffers = [np.cumsum([0, *map(len, texts)], dtype=np.int32), b"".join(texts)]
    else:
        is_known = np.ones(len(values), bool)
        buffers = [b"".join(values)]
    mask = None
    if not is_known.all():
        mask = pyarrow.py_buffer(np.packbits(is_known, bitorder="little"))
    return pyarrow.Array.from_buffers(kind, len(values), [mask, *map(pyarrow.py_buffer, buffers)])


def content_hash(text: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of a document's UTF-8."""
    return hashlib.sha256(text).digest()[:HASH_BYTES]


def arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet.

    Raises  ConfigError if pyarrow is not installed.
    """
    return require("pyarrow", "parquet", PURPOSE), require("pyarrow.parquet", "parquet", PURPOSE)


def number_kinds(pyarrow: Any) -> dict[str, Any]:
    """Types of the columns of numbers and hashes."""
    kinds = dict.fromkeys(("line", "start", "stop"), pyarrow.int64())
    return {**kinds, "tokens": pyarrow.int32(), "hash": pyarrow.binary(HASH_BYTES)}


def schema_of(pyarrow: Any, metadata_names: Sequence[str]) -> Any:
    """The columns of the index."""
    kinds = {
        # A dictionary: a few file names repeated for millions of documents.
        "source": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "member": pyarrow.string(),
        **number_kinds(pyarrow),
    }
    columns = [(name, kinds[name]) for name in OWN]
    columns += [(name, pyarrow.string()) for name in dict.fromkeys(metadata_names)]
    return pyarrow.schema(columns)


def placed(
    path: Path, sources: Sequence[tuple[str, str | None]], lines_before: Sequence[int]
) -> Any:
    """The entries of a part, with file, member and line in the file.

    `sources` and `lines_before` have one entry for each of the part's extents.
    """
    pyarrow, parquet = arrow()
    compute = require("pyarrow.compute", "parquet", PURPOSE)
    # Not read_table, which imports a tenth of a second of other modules.
    table = parquet.ParquetFile(path).read()
    extent = table.column("source")
    text = pyarrow.string()
    offsets = array_of(pyarrow, lines_before, pyarrow.int64())
    columns = {
        "source": array_of(pyarrow, [name for name, _ in sources], text).take(extent),
        "member": array_of(pyarrow, [member for _, member in sources], text).take(extent),
        "line": compute.add(table.column("line"), offsets.take(extent)),
    }
    for name in table.column_names:
        if name not in ("source", "line"):
            columns[name] = table.column(name)
    return pyarrow.Table.from_arrays([*columns.values()], names=[*columns])


def write_index(file: Any, tables: Iterable[Any], metadata_names: Sequence[str]) -> None:
    """Write tables one after the other to an open file, in row groups of GROUP_ROWS."""
    pyarrow, parquet = arrow()
    schema = schema_of(pyarrow, metadata_names)
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in regrouped(pyarrow, tables):
            writer.write_table(table.cast(schema), row_group_size=GROUP_ROWS)


def join_indexes(paths: Sequence[Path], file: Any) -> None:
    """Write several indexes as one, in order; metadata that one of them lacks is null there.

    Raises  DataError if one is damaged.
    """
    pyarrow, parquet = arrow()
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(parquet.ParquetFile(path)) for path in paths]
            columns: dict[str, None] = {}
            for index in opened:
                columns |= dict.fromkeys(metadata_of(index))
            names = list(columns)
            tables = (
                plain(pyarrow, index.read_row_group(group), names)
                for index in opened
                for group in range(index.num_row_groups)
            )
            write_index(file, tables, names)
    except (pyarrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{', '.join(map(str, paths))}: cannot read a document index: {error}; remove it or"
            " prepare again"
        ) from None


def slice_index(path: Path, documents: range, file: Any) -> None:
    """Write the entries of neighbouring documents as an index of their own.

    Raises  DataError if the index is damaged.
    """
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as index:
            names = metadata_of(index)
            tables = (plain(pyarrow, table, names) for table in slices(index, documents))
            write_index(file, tables, names)
    except (pyarrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it or prepare again") from None


def metadata_of(index: Any) -> list[str]:
    """Names of the metadata columns of an open index."""
    return [name for name in index.schema_arrow.names if name not in OWN]


def slices(index: Any, documents: range) -> Iterator[Any]:
    """The parts of row groups that hold the documents."""
    first = 0
    for group in range(index.num_row_groups):
        rows = index.metadata.row_group(group).num_rows
        start = max(documents.start - first, 0)
        stop = min(documents.stop - first, rows)
        if start < stop:
            yield index.read_row_group(group).slice(start, stop - start)
        first += rows


def plain(pyarrow: Any, table: Any, metadata_names: Sequence[str]) -> Any:
    """A table with all metadata columns and its sources as strings.

    Dictionaries of different files cannot be concatenated.
    """
    for name in metadata_names:
        if name not in table.schema.names:
            table = table.append_column(name, pyarrow.nulls(table.num_rows, pyarrow.string()))
    sources = table.column("source").cast(pyarrow.string())
    return table.select([*OWN, *metadata_names]).set_column(0, "source", sources)


def regrouped(pyarrow: Any, tables: Iterable[Any]) -> Iterator[Any]:
    """The same entries in tables of GROUP_ROWS; the last one may be shorter."""
    pending: list[Any] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        while rows >= GROUP_ROWS:
            whole = pyarrow.concat_tables(pending)
            yield whole.slice(0, GROUP_ROWS).combine_chunks()
            pending = [whole.slice(GROUP_ROWS)]
            rows -= GROUP_ROWS
    if rows:
        yield pyarrow.concat_tables(pending).combine_chunks()


def read_provenance(prefix: str, number: int) -> dict[str, Any] | None:
    """The index entry of one document; None if the token file has no index, as foreign ones.

    Raises  DataError if the index is damaged or lacks the document.
    """
    path = Path(prefix + SUFFIX)
    if not path.exists():
        return None
    pyarrow, _ = arrow()
    try:
        group, place = divmod(number, GROUP_ROWS)
        table = row_group(str(path), path.stat().st_mtime_ns, group)
        (entry,) = table.slice(place, 1).to_pylist()
        return {**entry, "hash": entry["hash"].hex()}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path}: lacks document {number} ({reason}); the index is damaged or belongs to"
            " another token file: remove it or prepare again"
        ) from None


@lru_cache(maxsize=4)
def row_group(path: str, stamp: int, group: int) -> Any:
    """A row group of an index; `stamp` is the file's age, so that a newer file is read again."""
    _, parquet = arrow()
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group)


def never_there(prefixes: Sequence[str], names: Sequence[str]) -> list[str]:
    """The metadata names that no document has, mistyped ones; none if there are no documents."""
    _, parquet = arrow()
    existing: set[str] = set()
    documents = 0
    for prefix in prefixes:
        path = Path(prefix + SUFFIX)
        if not path.exists():
            continue
        with parquet.ParquetFile(path) as index:
            documents += index.metadata.num_rows
            for group in range(index.metadata.num_row_groups):
                existing |= filled_columns(index, group)
    if not documents:
        return []
    return [name for name in names if name not in existing]


def filled_columns(index: Any, group: int) -> set[str]:
    """Columns with a value in a row group, from its statistics: no data is read."""
    metadata = index.metadata.row_group(group)
    return {
        name
        for i, name in enumerate(index.schema_arrow.names)
        if metadata.column(i).statistics.null_count < metadata.num_rows
    }


NO_INDEX = "-"


def index_fault(prefix: str, sizes: NDArray[np.int32]) -> str:
    """The fault of the index of a token file whose documents have `sizes` (N,) tokens; empty if
    none.

    NO_INDEX if there is no index, or if it cannot be read because pyarrow is not installed.
    """
    path = Path(prefix + SUFFIX)
    if not path.exists() or find_spec("pyarrow") is None:
        return NO_INDEX
    pyarrow, parquet = arrow()
    counts = [np.empty(0, np.int32)]
    try:
        with parquet.ParquetFile(path) as index:
            for group in range(index.num_row_groups):
                table = index.read_row_group(group, columns=["tokens"])
                counts.append(table.column("tokens").to_numpy())
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        return f"cannot be read: {error}"
    tokens = np.concatenate(counts)
    if len(tokens) != len(sizes):
        return f"it describes {len(tokens)} documents, but the .idx has {len(sizes)}"
    wrong = np.flatnonzero(tokens != sizes)
    if not len(wrong):
        return ""
    first = wrong[0]
    return f"document {first} has {tokens[first]} tokens, but {sizes[first]} in the .idx"
