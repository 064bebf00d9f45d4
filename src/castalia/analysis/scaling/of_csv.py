"""Points from a CSV file with the columns parameters, tokens and loss."""

import csv
from pathlib import Path

from castalia.analysis.scaling.points import Point, Points, parse_number
from castalia.core.errors import ConfigError, DataError, nearest
from castalia.core.hub import did_you_mean

COLUMNS = ("parameters", "tokens", "loss")


def points_of_csv(path: Path, metric: str = "loss") -> Points:
    """The points of a file; numbers may be written as 1.4B.

    Further columns: `run` names what the bootstrap draws, by default each row; `model` what
    --hold-out names, by default the run; `step` is shown.

    metric  the column of the loss.
    Raises  DataError if a column is missing or a cell is no number.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist or is no file; {did_you_mean(path, 'expected CSV')}"
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from None
    wanted = (*COLUMNS[:2], metric)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(
            f"{path} lacks the column {missing[0]!r}{nearest(missing[0], names)}; a scaling law"
            f" needs {', '.join(wanted)}, got {', '.join(names) or 'no header'}"
        )
    points = [point_of_row(path, place, row, metric) for place, row in enumerate(rows, 2)]
    return Points(points, metric, "the column `parameters`")


def point_of_row(path: Path, line: int, row: dict[str, str | None], metric: str) -> Point:
    """One row.

    Raises  DataError.
    """
    values: list[float] = []
    for name in (*COLUMNS[:2], metric):
        try:
            values.append(parse_number(row.get(name) or "", f"{path} line {line}, {name}"))
        except ConfigError as error:
            raise DataError(str(error)) from None
    model = (row.get("model") or "").strip()
    # A row is a run of its own: models of one size are trained on several numbers of tokens.
    run = (row.get("run") or f"{model or path.stem}:{line}").strip()
    model = model or run
    step = (row.get("step") or "").strip()
    parameters, tokens, loss = values
    return Point(model, run, parameters, tokens, loss, int(step) if step.isdecimal() else None)
