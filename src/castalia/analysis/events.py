"""The events of a run: checkpoints, resumes, skipped steps, rollbacks, as a panel and a table."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from castalia.analysis.html import folded, table
from castalia.analysis.panel import Panel, Series
from castalia.analysis.runs import RunFiles

LANES = ("checkpoint", "resume", "skipped step", "rollback", "warning", "stop")
"""From the bottom of the panel to its top."""


class Event(NamedTuple):
    """One thing that happened."""

    step: int
    lane: str
    text: str


def events_of(run: RunFiles) -> list[Event]:
    """The events of a run by step."""
    events = [Event(step, "checkpoint", "saved") for step in run.checkpoints]
    events += decisions(run)
    returns = {event.get("to") for event in run.events}
    for line in run.metrics:
        step = line["step"]
        if line.get("skipped"):
            events.append(Event(step, "skipped step", str(line["skipped"])))
        # A rollback loads too, and has its own event.
        if "load_seconds" in line and step - 1 not in returns:
            text = f"from step {step - 1}, read in {line['load_seconds']} s"
            events.append(Event(step, "resume", text))
    return sorted(events)


def decisions(run: RunFiles) -> Iterator[Event]:
    """The guard's decisions; skips are in the metrics, with those that the config asks for."""
    for event in run.events:
        # A fault of an evaluation has words of its own.
        what = event.get("error") or (
            f"{event['event']}: loss {event.get('loss')}, gradient norm {event.get('grad_norm')}"
        )
        action = event.get("action")
        if action == "rollback":
            yield Event(event["step"], "rollback", f"{what}; back to step {event.get('to')}")
        elif action == "warn":
            yield Event(event["step"], "warning", what)
        elif action == "stop":
            yield Event(event["step"], "stop", what)


def events_panel(runs: Sequence[RunFiles]) -> Panel | None:
    """A mark for each event in the lane of its kind; None without an event."""
    series: list[Series] = []
    for place, run in enumerate(runs):
        events = events_of(run)
        # A series a kind: its marks have one colour and one name in the hover text.
        for number, lane in enumerate(LANES):
            own = [event for event in events if event.lane == lane]
            if own:
                steps = np.array([event.step for event in own], np.float64)
                curve = (steps, np.full(len(own), float(number)))
                texts = [event.text for event in own]
                series.append(Series(lane, place, curve, texts=texts, smoothed=False))
    if not series:
        return None
    return Panel(
        "Events",
        "",
        "Checkpoints, resumes, steps without an update, rollbacks.",
        series,
        kind="events",
        wide=True,
    )


def events_table(runs: Sequence[RunFiles]) -> str:
    """Every event but the checkpoints as rows, folded; "" without one."""
    rows = [
        [run.name, str(event.step), event.lane, event.text]
        for run in runs
        for event in events_of(run)
        if event.lane != "checkpoint"
    ]
    if not rows:
        return ""
    return folded(f"{len(rows)} events", table(["run", "step", "event", ""], rows, "words"))
