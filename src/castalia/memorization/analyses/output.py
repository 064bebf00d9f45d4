"""The numbers of a study as files: one JSON, and each table as CSV and Parquet."""

import csv
from pathlib import Path

from castalia.core.extras import require
from castalia.core.files import atomic_write, write_json
from castalia.memorization.analyses.files import EXTRA, PURPOSE
from castalia.memorization.analyses.study import Study

JSON = "memorization.json"


def write_numbers(study: Study, folder: Path) -> None:
    """Write `memorization.json`, and NAME.csv and NAME.parquet of each table that has a line.

    Raises  CastaliaError if a file cannot be written.
    """
    arrow = require("pyarrow", EXTRA, PURPOSE)
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    write_json(folder / JSON, study.data())
    for name, lines in study.tables.items():
        # Of an earlier study with other files.
        for suffix in ("csv", "parquet"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        if not lines:
            continue
        with atomic_write(folder / f"{name}.csv") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        with atomic_write(folder / f"{name}.parquet", "wb") as file:
            parquet.write_table(arrow.Table.from_pylist(lines), file, compression="zstd")
