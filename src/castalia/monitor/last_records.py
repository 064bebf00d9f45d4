"""The last lines of a metrics.jsonl, without reading the rest."""

import json
import os
from pathlib import Path
from typing import Any

from castalia.core.log_lines import text_of

TAIL = 1 << 16
"""Bytes that are read, from the end: a hundred steps or more."""


def last_records(path: Path) -> list[dict[str, Any]]:
    """The last objects of a metrics.jsonl; [] if there are none. Damaged lines are left out.

    The file of a long run has hundreds of MB, so only its end is read.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    records = []
    # The first line may be cut by the seek, and what follows the last line break by a crash.
    for line in lines[1 if size > TAIL else 0 : -1]:
        text = text_of(line)
        if text is None:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
