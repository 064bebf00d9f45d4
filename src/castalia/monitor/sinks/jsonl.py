"""metrics.jsonl: the record of a run that everything else reads."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, cannot_write
from castalia.monitor.sinks.sink import SINKS, Sink, SinkConfig


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, oldest first. A last line cut off by a crash is ignored.

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


def recorded_hashes(path: Path, steps: range | None = None) -> dict[int, int]:
    """The rows_hash of steps, counted from 0, in a metrics.jsonl; a step that was trained again
    counts as it was last. `steps` keeps those alone.

    Raises  DataError if the file cannot be read.
    """
    found: dict[int, int | None] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the end of a line that a crash cut off
                if not isinstance(record, dict):
                    continue
                # The line of step N is about the update that leads to checkpoint N.
                step = record.get("step", 0) - 1
                if step >= 0 and (steps is None or step in steps):
                    found[step] = record.get("rows_hash")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return {step: value for step, value in found.items() if value is not None}


@SINKS.register("jsonl")
class JsonlSink(Sink):
    """One JSON object a step, appended and flushed at once."""

    nested = True

    class Config(SinkConfig):
        """metrics.jsonl in the run folder. It has no options."""

        kind: Literal["jsonl"] = "jsonl"

    file: IO[str] | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "metrics.jsonl"

    def start(self, step: int) -> None:
        """Open the file; the lines after `step` are dropped from it.

        Raises  CastaliaError if the folder cannot be written.
        """
        try:
            if self.path.exists():
                self.keep_until(step)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def keep_until(self, step: int) -> None:
        """Rewrite the file without the steps that will run again."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line. NaN and infinity become null, because JSON has neither."""
        clean: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            missing = isinstance(value, float) and not math.isfinite(value)
            clean[name] = None if missing else value
        assert self.file is not None
        try:
            self.file.write(json.dumps(clean) + "\n")
            # Flushed at each step: a killed run loses no line that it had reported.
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the line of `step`, the newest one, again with more metrics."""
        line: dict[str, Any] = {}
        for record in read_metrics(self.path):
            if record["step"] == step:
                line = record
        self.close()
        self.start(step - 1)
        self.write(step, {**line, **metrics})

    def close(self) -> None:
        """Flush to disk and close."""
        if self.file is None:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
