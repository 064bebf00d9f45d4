"""Rows as text: aligned columns, CSV, Markdown and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

Rows = Sequence[Sequence[Any]]


def as_csv(names: Sequence[str], rows: Rows) -> str:
    """CSV with a header. NULL is empty; floats have all their digits."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([moment(value) for value in row])
    return output.getvalue()


def as_json(names: Sequence[str], rows: Rows) -> str:
    """A list of objects. NaN and infinities, for which JSON has no numbers, are texts. Of columns
    with one name the later ones are NAME_1 and so on."""
    keys = distinct(names)
    objects = [dict(zip(keys, map(plain, row), strict=True)) for row in rows]
    return json.dumps(objects, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def distinct(names: Sequence[str]) -> list[str]:
    """Names of columns that differ, for an object has each key once."""
    taken: list[str] = []
    for name in names:
        other = name
        number = 0
        while other in taken or (number and other in names):
            number += 1
            other = f"{name}_{number}"
        taken.append(other)
    return taken


def as_markdown(names: Sequence[str], rows: Rows) -> str:
    """A table of GitHub's Markdown."""
    rules = {True: "---:", False: "---"}
    lines = [[escaped(name) for name in names]]
    lines.append([rules[right] for right in numeric(names, rows)])
    lines += [[escaped(shown(value)) for value in row] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def as_columns(names: Sequence[str], rows: Rows) -> str:
    """Aligned columns, numbers to the right, six digits of each float."""
    cells = [list(names), *([shown(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = {True: str.rjust, False: str.ljust}
    aligned = [sides[right] for right in numeric(names, rows)]
    lines = []
    for row in cells:
        padded = [side(cell, width) for cell, width, side in zip(row, widths, aligned, strict=True)]
        # Spaces at the ends of lines would show in pasted output and in diffs.
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def numeric(names: Sequence[str], rows: Rows) -> list[bool]:
    """For each column whether it holds numbers only."""
    if not rows:
        return [False] * len(names)
    return [
        any(value is not None for value in column)
        and all(value is None or is_number(value) for value in column)
        for column in zip(*rows, strict=True)
    ]


def is_number(value: Any) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value on one line; empty for NULL."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(moment(value)).splitlines())


def escaped(text: str) -> str:
    """Text in a cell of Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|")


def moment(value: Any) -> Any:
    """Times as ISO 8601 writes them; other values as they are."""
    if isinstance(value, datetime):
        # A space in place of the T, for people.
        return value.isoformat(sep=" ")
    return value


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    # The names of JavaScript, which Python's float() reads too.
    if value == math.inf:
        return "Infinity"
    if value == -math.inf:
        return "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)
