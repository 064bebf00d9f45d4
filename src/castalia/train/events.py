"""events.jsonl: the guard's decisions, one JSON object a line, and the words for them."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.log_lines import BROKEN, LineLog, read_log
from castalia.train.stopping import say

EVENTS = "events.jsonl"


def append_event(output: Path, event: dict[str, Any]) -> None:
    """Append one line and force it to the disk, before anything acts on the decision."""
    # Decisions are few: the file is small, and a last line that a crash cut off is removed.
    log = LineLog(output / EVENTS)
    log.open()
    log.append(json.dumps(event), event["step"])
    # Before anything acts on it: after a crash in the rollback the decision still stands.
    log.close()


def read_events(output: str | Path) -> list[dict[str, Any]]:
    """The decisions of a run, oldest first; [] without a file.

    Raises  DataError if a line is not an event, or not as it was written: a run skips the steps
            that they name, so that it must not guess them.
    """
    path = Path(output) / EVENTS
    events = []
    for line in read_log(path) if path.exists() else ():
        if line.fault == BROKEN:
            # Deleting a line revokes its decision: that is for people to do.
            warn(f"{path} line {line.number}: {line.fault}; what stands there is followed")
        elif line.fault:
            raise DataError(
                f"{path} line {line.number} is damaged: {line.fault}; the run skips the steps that"
                " these lines name: restore the file from a copy, or move it away to go on with"
                " the decisions in the checkpoint alone"
            )
        try:
            event = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {line.number} is not JSON: {error}") from None
        if not isinstance(event, dict) or not {"step", "event"} <= event.keys():
            raise DataError(f"{path}: expected a step and an event on each line, got {event!r}")
        events.append(event)
    return events


def warn(text: str) -> None:
    """A warning on stderr."""
    say(f"castalia: warning: {text}", sys.stderr)


def in_words(kind: str, loss: float, norm: float) -> str:
    """The fault of a step's numbers."""
    # A spike has finite numbers, and both say how large it was.
    if kind == "spike":
        return f"spike: loss {loss:.4f}, gradient norm {norm:.3g},"
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not math.isfinite(norm):
        return f"gradient norm {norm}"
    # A verdict is the worst of all ranks, and this one's own numbers are fine.
    return "NaN or infinity on another rank"


def ranges(numbers: Sequence[int]) -> str:
    """`24 to 35, 40`: ascending numbers in words."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in spans)


def finite(value: float) -> float | str:
    """The number, or its name, because JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
