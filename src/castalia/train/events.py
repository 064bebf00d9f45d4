"""events.jsonl: the guard's decisions, one JSON object a line, and the words for them."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, cannot_write
from castalia.monitor import read_metrics
from castalia.train.stopping import say

EVENTS = "events.jsonl"


def append_event(output: Path, event: dict[str, Any]) -> None:
    """Append one line and force it to the disk, before anything acts on the decision."""
    path = output / EVENTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            # Before anything acts on it: after a crash in the rollback the decision still stands.
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_events(output: str | Path) -> list[dict[str, Any]]:
    """The decisions of a run, oldest first; [] without a file.

    Raises  DataError if a line is not an event.
    """
    path = Path(output) / EVENTS
    events = read_metrics(path) if path.exists() else []
    if events and not path.read_text(encoding="utf-8").endswith("\n"):
        # A crash cut the last line off. The next event must not be appended to its remains.
        with atomic_write(path) as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
    for event in events:
        if not isinstance(event, dict) or not {"step", "event"} <= event.keys():
            raise DataError(f"{path}: expected a step and an event on each line, got {event!r}")
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
