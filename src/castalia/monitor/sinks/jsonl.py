"""metrics.jsonl: the record of a run that everything else reads."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from castalia.core.errors import DataError
from castalia.core.log_lines import BROKEN, CHANGED, LineLog, LogLine, read_log, write_log
from castalia.monitor.sinks.sink import SINKS, Sink, SinkConfig

FILE = "metrics.jsonl"
LOST = "lost"
"""Key of the line that stands for steps whose lines were lost: the steps, in words."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, oldest first. A last line cut off by a crash is ignored.

    A line that does not have its own checksum is left out, with a warning; so is told where lines
    are missing. Lines of older versions have no checksum and are taken as they are.
    Raises  DataError naming the line if a line without a checksum is not JSON.
    """
    records: list[dict[str, Any]] = []
    for line in read_log(path):
        if line.fault:
            warn_of(path, line)
        if line.fault == CHANGED:
            continue
        try:
            records.append(json.loads(line.text))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {line.number} is not JSON: {error}") from None
    return records


def warn_of(path: str | Path, line: LogLine) -> None:
    """Warn of a fault of a line."""
    left_out = "; it is left out" if line.fault == CHANGED else ""
    warnings.warn(f"{path} line {line.number} is damaged: {line.fault}{left_out}", stacklevel=3)


def recorded_hashes(path: Path, steps: range | None = None) -> dict[int, int]:
    """The rows_hash of steps, counted from 0, in a metrics.jsonl; a step that was trained again
    counts as it was last. `steps` keeps those alone.

    A damaged line is left out, with a warning.
    Raises  DataError if the file cannot be read.
    """
    found: dict[int, int | None] = {}
    try:
        for line in read_log(path):
            if line.fault == CHANGED:
                warn_of(path, line)
                continue
            record = object_of(line)
            if record is None:
                continue
            # The line of step N is about the update that leads to checkpoint N.
            step = record["step"] - 1
            if step >= 0 and (steps is None or step in steps):
                found[step] = record.get("rows_hash")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return {step: value for step, value in found.items() if value is not None}


def object_of(line: LogLine) -> dict[str, Any] | None:
    """The object of a line that has a step; None for any other."""
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record


@SINKS.register("jsonl")
class JsonlSink(Sink):
    """One JSON object a step, appended and flushed at once, with a checksum.

    least  the last step that the file must have when it is continued; None if that is not known.
    told   what was found wrong when it was continued, one sentence each.
    """

    nested = True
    least: int | None = None

    class Config(SinkConfig):
        """metrics.jsonl in the run folder. It has no options."""

        kind: Literal["jsonl"] = "jsonl"

    def __init__(self, config: SinkConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.log = LineLog(folder / FILE)
        self.told: list[str] = []

    @property
    def path(self) -> Path:
        """The file."""
        return self.log.path

    def start(self, step: int) -> None:
        """Open the file; the lines after `step` are dropped from it.

        Where lines up to `step` are damaged or missing, one line with the key `lost` stands for
        them; `told` says so.
        Raises  CastaliaError if the folder cannot be written.
        """
        self.told = []
        if self.path.exists() or self.least:
            self.keep_until(step)
        self.log.open()

    def keep_until(self, step: int) -> None:
        """Rewrite the file without the steps that will run again."""
        texts: dict[int, bytes] = {}
        dropped = False
        # Whether lines were lost before the first one that is left.
        is_headless = True
        for line in read_log(self.path) if self.path.exists() else ():
            record = object_of(line)
            dropped = step in texts or (record is not None and record["step"] > step)
            if dropped:
                # Lines behind the step run again, whatever stands in them.
                break
            if line.fault or record is None:
                self.told.append(f"line {line.number}: {line.fault or 'it is no object of a step'}")
            if record is not None and line.fault != CHANGED:
                is_headless &= bool(texts) or line.fault == BROKEN or line.number > 1
                texts[record["step"]] = line.text
        last = max(texts, default=0)
        if self.least is not None and self.least > last:
            self.told.append(
                f"it ends with step {last}, though a checkpoint relies on its lines up to step"
                f" {self.least}"
            )
        if self.told:
            kept = "intact lines are kept, and a line with the key 'lost' stands for each gap"
            self.told = [f"{self.path} is damaged: {'; '.join(self.told)}; {kept}"]
            write_log(self.path, with_lost(texts, is_headless, self.least or 0))
        elif dropped:
            write_log(self.path, texts.values())

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line. NaN and infinity become null, because JSON has neither."""
        self.log.append(json.dumps({"step": step, **finite(metrics)}), step)

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the line of `step`, the newest one, again with more metrics."""
        line: dict[str, Any] = {}
        for record in read_metrics(self.path):
            if record["step"] == step:
                line = record
        self.close()
        self.least = None
        self.start(step - 1)
        self.write(step, {**line, **metrics})

    def close(self) -> None:
        """Flush to disk and close."""
        self.log.close()


def finite(value: Any) -> Any:
    """A value of JSON with null in the place of NaN and infinity, however deep they stand."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def with_lost(texts: Mapping[int, bytes], is_headless: bool, least: int) -> Iterator[bytes]:
    """Lines in the order of their steps, with one line for the steps that are missing in each
    place; before the first line if lines were lost there, and behind the last one up to `least`."""
    before: int | None = None
    for step in sorted(texts):
        if before is None and is_headless and step > 1:
            yield lost_line(f"steps up to {step - 1}", step - 1)
        elif before is not None and step > before + 1:
            yield lost_line(f"steps {before + 1} to {step - 1}", step - 1)
        yield texts[step]
        before = step
    if before is None and least:
        yield lost_line(f"steps up to {least}", least)
    elif before is not None and least > before:
        yield lost_line(f"steps {before + 1} to {least}", least)


def lost_line(words: str, step: int) -> bytes:
    """The line that stands for lost ones, under the number of the last step of them."""
    return json.dumps({"step": step, LOST: words}).encode()
