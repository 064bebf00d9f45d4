"""The metrics of a run as a table: one column a number, one row a step."""

import importlib
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.hub import did_you_mean
from castalia.monitor.sinks import read_metrics as read_records
from castalia.monitor.sinks.sink import flatten

FILE = "metrics.jsonl"
SHOWN = 6
"""Significant digits of a number in a table's repr."""


class MetricsTable:
    """Columns of equal length by name, with the few methods of a pandas DataFrame that need none.

    `table["loss"]` is an array, `table.columns` lists the names, `len(table)` counts the steps, and
    `dict(table)` or `pandas.DataFrame(dict(table))` takes all of it elsewhere.
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]], where: str = "") -> None:
        self.data = dict(columns)
        self.where = where
        """Where the numbers are from, for people."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.data)

    def keys(self) -> list[str]:
        """Names of the columns: `dict(table)` asks for them under this name."""
        return self.columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.data:
            raise KeyError(f"no column {name!r}; have: {', '.join(self.data)}")
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        return name in self.data

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(next(iter(self.data.values()), ()))

    def __repr__(self) -> str:
        """The first and the last value of each column."""
        width = max((len(name) for name in self.data), default=0)
        lines = [f"MetricsTable({self.where!r}, {len(self)} steps; first and last value)"]
        for name, values in self.data.items():
            if len(values):
                lines.append(f"  {name:<{width}}  {shown(values[0])}  {shown(values[-1])}")
        return "\n".join(lines)


def shown(value: Any) -> str:
    """One value in few characters."""
    if isinstance(value, float | np.floating):
        return f"{value:.{SHOWN}g}"
    return str(value)


def read_metrics(run: str | os.PathLike[str]) -> Any:
    """The metrics of a run, one row a step: a pandas DataFrame, or a MetricsTable without pandas.

    Takes   a run folder, its metrics.jsonl, or what `castalia.train` returned.
    Columns the keys of metrics.jsonl, nested ones under one name each: `loss`, `grad_norm` and
            `sources/NAME/loss`. Numbers that a step lacks are NaN; text, such as the reason of a
            skipped step, is None.
    Units   loss in nats a token, `step_seconds` in seconds, `memory_bytes` in bytes; see the table
            of docs/training.md.
    Raises  DataError if there are no metrics, or a line of them is not JSON.

    Examples
        >>> import castalia
        >>> run = castalia.train("debug", steps=4, output="runs/first")
        >>> table = castalia.read_metrics("runs/first")
        >>> len(table)
        4
        >>> table["step"].tolist()
        [1, 2, 3, 4]
        >>> bool(table["loss"].max() < 7)
        True
    """
    path = metrics_file(Path(run))
    columns = columns_of([flatten(record) for record in read_records(path)])
    # pandas is no dependency of ours, but where it is installed its methods are wanted.
    if find_spec("pandas") is None:
        return MetricsTable(columns, str(path.parent))
    return importlib.import_module("pandas").DataFrame(columns)


def metrics_file(path: Path) -> Path:
    """The metrics.jsonl that `path` means.

    Raises  DataError if there is none.
    """
    if path.name == "config.yaml":
        path = path.parent
    if path.is_file():
        return path
    if (path / FILE).is_file():
        return path / FILE
    if path.is_dir():
        raise DataError(
            f"no {FILE} in {path}: it is not the folder of a run, or its first step has not ended;"
            " `castalia runs` lists runs"
        )
    raise DataError(f"no run folder {path}; {did_you_mean(path, '`castalia runs` lists runs')}")


def columns_of(rows: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """The values of each name, in the order in which the names first occur."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: column([row.get(name) for row in rows]) for name in names}


def column(values: list[Any]) -> NDArray[Any]:
    """int64 if every step has an integer, else float64 with NaN; objects if some are text."""
    kinds = {type(value) for value in values}
    # The types themselves: JSON's true is no integer, though Python counts it as one.
    if kinds == {int}:
        return np.array(values, dtype=np.int64)
    if kinds <= {int, float, type(None)}:
        return np.array(values, np.float64)  # None becomes NaN
    # np.array would make a matrix of lists of one length.
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
