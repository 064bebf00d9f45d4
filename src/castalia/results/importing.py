"""Files of results, and other stores, into one store. One bad file does not stop the others."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import files_in
from castalia.results.dialects import read_results
from castalia.results.formats import counted
from castalia.results.query import EXTRA, PURPOSE
from castalia.results.store import FILE, SUFFIX, ResultsStore, latest_rows, table_of

KINDS = (".json", ".csv")
"""Suffixes of the files that a folder is searched for."""


class Imported(NamedTuple):
    """What an import did."""

    files: int
    rows: int
    """In the files."""
    dropped: int
    """Rows for which a later file has the same number, by KEY."""
    total: int
    """Rows in the store."""
    suites: dict[str, tuple[int, int]]
    """Suite -> files, rows."""
    problems: list[str]
    """One sentence for each file that could not be read."""

    def lines(self) -> list[str]:
        """What to tell about it."""
        width = max(map(len, self.suites), default=0)
        lines = [
            f"{suite:{width}}  {counted(files, 'file')}, {counted(rows, 'row')}"
            for suite, (files, rows) in self.suites.items()
        ]
        return [
            *lines,
            f"imported {counted(self.files, 'file')}, {counted(self.rows, 'row')}, of them"
            f" {self.dropped} older duplicates dropped; the table has"
            f" {counted(self.total, 'row')}",
        ]


def import_results(paths: Iterable[str | os.PathLike[str]], store: ResultsStore) -> Imported:
    """Read files of results, and those in folders, and add their rows to `store`.

    Raises  DataError if the store is damaged; CastaliaError if it cannot be written. A path that
            cannot be read is one of `problems`.
    """
    arrow = require("pyarrow", EXTRA, PURPOSE)
    tables = [table_of([])]
    files_of: Counter[str] = Counter()
    rows_of: Counter[str] = Counter()
    problems: list[str] = []
    for path in paths:
        try:
            names = result_files(Path(path))
        except DataError as error:
            problems.append(str(error))
            continue
        for name in names:
            try:
                table = table_in(name)
            except DataError as error:
                problems.append(str(error))
                continue
            tables.append(table)
            for count in table["suite"].value_counts().to_pylist():
                rows_of[count["values"]] += count["counts"]
                files_of[count["values"]] += 1
    new = arrow.concat_tables(tables)
    standing = new.take(latest_rows(new))
    suites = {suite: (files_of[suite], rows_of[suite]) for suite in sorted(rows_of)}
    total = store.merge(standing)
    dropped = len(new) - len(standing)
    return Imported(len(tables) - 1, len(new), dropped, total, suites, problems)


def table_in(path: Path) -> Any:
    """The rows of a file as a pyarrow.Table.

    Raises  DataError naming the file if it is damaged or none of the known forms.
    """
    if path.suffix == SUFFIX:
        return ResultsStore(path).table()
    return table_of(read_results(path))


def result_files(path: Path) -> list[Path]:
    """The path itself, or the files of results in the folder.

    Raises  DataError if there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        return [path]
    names = [
        name
        for name in files_in(path)
        if (name.suffix in KINDS or name.name == FILE) and not name.name.startswith(".")
    ]
    if not names:
        raise DataError(f"{path}: no {', '.join(KINDS)} or {FILE} in this folder")
    return names
