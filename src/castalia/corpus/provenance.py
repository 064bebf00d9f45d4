"""`PREFIX.documents.parquet`: where each document of a token file came from."""

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
from castalia.corpus.documents import Row

SUFFIX = ".documents.parquet"
REJECTS = ".rejects.jsonl"
"""The documents that were left out, with file and line."""
GROUP_ROWS = 1 << 17
"""Documents a row group, so that the file does not depend on how the job was cut."""
HASH_BYTES = 16
MOST_TEXT = 2**31 - 1
"""Bytes of text that fit an Arrow array."""
OWN = ("source", "member", "line", "start", "stop", "tokens", "hash")
"""Columns that are ours; the id and the chosen metadata come after them."""


class DocumentColumns:
    """The rows of a part's documents, with the number of the piece in the place of the source, under its name, since no
    metadata may have that."""

    def __init__(self, kept: Sequence[str]) -> None:
        self.kept = tuple(kept)
        self.values: dict[str, list[Any]] = {name: [] for name in ("source", *OWN[2:], *kept)}

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
        values["source"] += [places[i] for i in chosen]
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
        kinds = {
            "source": pyarrow.int32(),
            **number_kinds(pyarrow),
            **dict.fromkeys(self.kept, pyarrow.string()),
        }
        arrays = [array_of(pyarrow, found, kinds[name]) for name, found in self.values.items()]
        table = pyarrow.Table.from_arrays(arrays, names=[*self.values])
        parquet.write_table(table, path, compression="none", use_dictionary=False)


def array_of(pyarrow: Any, values: Sequence[Any], kind: Any) -> Any:
    """Numbers, texts or hashes as an Arrow array of `kind`; None, and a number below 0, are null.

    What `pyarrow.array` gives, which first imports pandas where it is installed: a third of a second for each process.
    """
    buffers: list[Any]
    if pyarrow.types.is_integer(kind):
        numbers = np.asarray(values, kind.to_pandas_dtype())
        known, buffers = numbers >= 0, [numbers]
    elif pyarrow.types.is_string(kind):
        known = np.array([value is not None for value in values], bool)
        texts = [(value or "").encode("utf-8") for value in values]
        if sum(map(len, texts)) > MOST_TEXT:
            return pyarrow.array(values, kind)  # in several chunks
        buffers = [np.cumsum([0, *map(len, texts)], dtype=np.int32), b"".join(texts)]
    else:
        known, buffers = np.ones(len(values), bool), [b"".join(values)]
    mask = None if known.all() else pyarrow.py_buffer(np.packbits(known, bitorder="little"))
    return pyarrow.Array.from_buffers(kind, len(values), [mask, *map(pyarrow.py_buffer, buffers)])


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
    names = {
        "source": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "member": pyarrow.string(),
    }
    kinds = {**names, **number_kinds(pyarrow)}
    texts = dict.fromkeys(kept, pyarrow.string())
    return pyarrow.schema([(name, kinds[name]) for name in OWN] + list(texts.items()))


def placed(path: Path, sources: Sequence[tuple[str, str | None]], offsets: Sequence[int]) -> Any:
    """A part's documents as rows of the index: `sources` and lines before, one for each of its pieces."""
    pyarrow, parquet = arrow()
    table = parquet.ParquetFile(
        path
    ).read()  # read_table imports a tenth of a second of other things
    piece, texts = table.column("source"), pyarrow.string()
    before, compute = (
        array_of(pyarrow, offsets, pyarrow.int64()),
        require("pyarrow.compute", "parquet", "the index"),
    )
    columns = {
        "source": array_of(pyarrow, [name for name, _ in sources], texts).take(piece),
        "member": array_of(pyarrow, [member for _, member in sources], texts).take(piece),
        "line": compute.add(table.column("line"), before.take(piece)),
    }
    rest = {
        name: table.column(name) for name in table.column_names if name not in ("source", "line")
    }
    return pyarrow.Table.from_arrays([*columns.values(), *rest.values()], names=[*columns, *rest])


def write_index(file: Any, tables: Iterable[Any], kept: Sequence[str]) -> None:
    """Write tables one after the other to an open file, in row groups of GROUP_ROWS."""
    pyarrow, parquet = arrow()
    schema = schema_of(pyarrow, kept)
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in regrouped(pyarrow, tables):
            writer.write_table(table.cast(schema), row_group_size=GROUP_ROWS)


def join_indexes(paths: Sequence[Path], file: Any) -> None:
    """Several indexes as one, in their order; metadata that one of them lacks is null there.

    Raises  DataError if one is damaged.
    """
    pyarrow, parquet = arrow()
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(parquet.ParquetFile(path)) for path in paths]
            names = dict.fromkeys(
                name for one in opened for name in one.schema_arrow.names if name not in OWN
            )
            groups = (one.read_row_group(i) for one in opened for i in range(one.num_row_groups))
            write_index(file, (plain(pyarrow, group, [*names]) for group in groups), [*names])
    except (pyarrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{', '.join(map(str, paths))}: an index of documents cannot be read: {error}"
        ) from None


def slice_index(path: Path, documents: range, file: Any) -> None:
    """The rows of neighbouring documents of an index as an index of their own.

    Raises  DataError if it is damaged.
    """
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as opened:
            names = [name for name in opened.schema_arrow.names if name not in OWN]
            write_index(
                file, (plain(pyarrow, table, names) for table in slices(opened, documents)), names
            )
    except (pyarrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it or prepare again") from None


def slices(opened: Any, documents: range) -> Iterator[Any]:
    """The parts of row groups that hold the documents."""
    first = 0
    for group in range(opened.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        start, stop = max(documents.start - first, 0), min(documents.stop - first, rows)
        if start < stop:
            yield opened.read_row_group(group).slice(start, stop - start)
        first += rows


def plain(pyarrow: Any, table: Any, kept: Sequence[str]) -> Any:
    """A table of an index with every column of `kept`, its sources written out."""
    for name in kept:
        if name not in table.schema.names:
            table = table.append_column(name, pyarrow.nulls(table.num_rows, pyarrow.string()))
    sources = table.column("source").cast(pyarrow.string())
    return table.select([*OWN, *kept]).set_column(0, "source", sources)


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
    pyarrow, _ = arrow()
    try:
        group, place = divmod(number, GROUP_ROWS)
        table = row_group(str(path), path.stat().st_mtime_ns, group)
        (found,) = table.slice(place, 1).to_pylist()
        return {**found, "hash": found["hash"].hex()}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path}: has no document {number} ({reason}); the index is damaged or of another token file: remove it or"
            " prepare again"
        ) from None


def never_there(prefixes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which metadata no document of the token files has, as a mistyped name; none if there are no documents."""
    _, parquet = arrow()
    there: set[str] = set()
    documents = 0
    for path in (path for prefix in prefixes if (path := Path(prefix + SUFFIX)).exists()):
        with parquet.ParquetFile(path) as opened:
            documents += opened.metadata.num_rows
            columns = list(enumerate(opened.schema_arrow.names))
            for group in map(opened.metadata.row_group, range(opened.metadata.num_row_groups)):
                there |= {
                    name
                    for i, name in columns
                    if group.column(i).statistics.null_count < group.num_rows
                }
    return [name for name in names if name not in there] if documents else []


NO_INDEX = "-"


def index_fault(prefix: str, sizes: NDArray[np.int32]) -> str:
    """What is wrong with the index of a token file whose documents have `sizes` (N,) tokens; nothing is wrong: empty.

    NO_INDEX if there is none, or if it cannot be read because pyarrow is not installed.
    """
    path = Path(prefix + SUFFIX)
    if not path.exists() or find_spec("pyarrow") is None:
        return NO_INDEX
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as file:
            groups = (
                file.read_row_group(i, columns=["tokens"]) for i in range(file.num_row_groups)
            )
            found = [group.column("tokens").to_numpy() for group in groups]
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        return f"cannot be read: {error}"
    tokens = np.concatenate([np.empty(0, np.int32), *found])
    if len(tokens) != len(sizes):
        return f"{len(tokens)} documents, but the .idx has {len(sizes)}"
    wrong = np.flatnonzero(tokens != sizes)
    return (
        f"document {wrong[0]} has {tokens[wrong[0]]} tokens, {sizes[wrong[0]]} in the .idx"
        if len(wrong)
        else ""
    )


@lru_cache(maxsize=4)
def row_group(path: str, stamp: int, group: int) -> Any:
    """A row group of an index; `stamp` is its age, so that a newer file is read again."""
    _, parquet = arrow()
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group)
