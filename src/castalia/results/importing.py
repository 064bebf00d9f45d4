"""Files of results into a store: folders are walked, and one bad file does not stop the others."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from castalia.core.errors import DataError
from castalia.core.files import files_in
from castalia.results.dialects import read_results
from castalia.results.schema import KEY, Result
from castalia.results.store import ResultsStore

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
            f"{suite:{width}}  {files} files, {rows} rows"
            for suite, (files, rows) in sorted(self.suites.items())
        ]
        return [
            *lines,
            f"imported {self.files} files, {self.rows} rows, of them {self.dropped} older"
            f" duplicates dropped; the table has {self.total} rows",
        ]


def import_results(paths: Iterable[str | os.PathLike[str]], store: ResultsStore) -> Imported:
    """Read files of results, and those in folders, and add their rows to `store`.

    Raises  DataError if the store is damaged; CastaliaError if it cannot be written. A path that
            cannot be read is one of `problems`.
    """
    rows: list[Result] = []
    files_of: Counter[str] = Counter()
    rows_of: Counter[str] = Counter()
    problems: list[str] = []
    files = 0
    for path in paths:
        try:
            names = result_files(Path(path))
        except DataError as error:
            problems.append(str(error))
            continue
        for name in names:
            try:
                found = read_results(name)
            except DataError as error:
                problems.append(str(error))
                continue
            files += 1
            rows += found
            counts = Counter(row.suite for row in found)
            rows_of.update(counts)
            files_of.update(counts.keys())
    distinct = {tuple(getattr(row, column) for column in KEY) for row in rows}
    total = store.add(rows) if rows else store.table().num_rows
    suites = {suite: (files_of[suite], rows_of[suite]) for suite in rows_of}
    return Imported(files, len(rows), len(rows) - len(distinct), total, suites, problems)


def result_files(path: Path) -> list[Path]:
    """The path itself, or the files of results in the folder.

    Raises  DataError if there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        return [path]
    names = [
        name for name in files_in(path) if name.suffix in KINDS and not name.name.startswith(".")
    ]
    if not names:
        raise DataError(f"{path}: no .json or .csv file in this folder")
    return names
