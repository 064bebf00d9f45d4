"""Where metrics go. The JSONL file is always on and is the truth."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, cannot_write


class Sink(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` of step `step`."""

    def close(self) -> None:
        """Flush and let go."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, oldest first; a last line cut off by a crash is left out.

    Raises  DataError naming the line if another line is not JSON.
    """
    records: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is not JSON: {error}") from None
    return records


class JsonlSink:
    """One JSON object a step, appended and flushed at once. Opened for a resume, it drops the lines after `step`."""

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self.path = Path(path)
        if self.path.exists():
            self.keep_until(resume_step)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def keep_until(self, step: int) -> None:
        """Rewrite the file without the steps that will run again."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; a number that is not finite becomes null, which JSON can hold."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        try:
            self.file.write(json.dumps({"step": step, **clean}) + "\n")
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Flush to disk and close."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
