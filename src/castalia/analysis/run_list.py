"""The runs below a folder: how far each is, and whether it still trains."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from castalia.checkpoint.find import complete_steps, folder_of
from castalia.config import read_yaml
from castalia.config.anchor import CONFIG, run_folder_of
from castalia.core.errors import ConfigError
from castalia.core.files import is_claimed
from castalia.monitor.last_records import last_records

DEEPEST = 4
"""Levels of folders that are searched for runs."""


class RunState(NamedTuple):
    """What the files of a run say about it."""

    folder: Path
    step: int
    """Last step in metrics.jsonl; 0 before the first."""
    steps: int | None
    """train.steps; None if config.yaml cannot be read."""
    loss: float | None
    """Loss of the last step that has one, in nats a token."""
    state: str
    """running, done, stopped, not begun, or unreadable if config.yaml is."""
    checkpoints: list[int]
    """Steps of the complete checkpoints, ascending."""
    changed: float
    """Unix time of the last change of metrics.jsonl, before the first step of config.yaml."""


def find_runs(folder: str | Path) -> list[RunState]:
    """The runs in `folder` or below, by path; `folder` may be a run itself.

    Raises  ConfigError if there is no such folder.
    """
    folder = folder_of(folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; castalia runs DIR lists the runs below DIR")
    return [run_state(run) for run in sorted(run_folders(folder, DEEPEST))]


def run_folders(folder: Path, levels: int) -> Iterator[Path]:
    """Run folders at most `levels` below `folder`; nothing inside of a run is one."""
    # The folder of a checkpoint has a config.yaml too, of the run around it.
    run = run_folder_of(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if run is not None:
        yield folder
        return
    if levels == 0:
        return
    try:
        inner = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:  # not readable, or gone since its parent was listed, as in /proc
        return
    for path in inner:
        if not Path(path).name.startswith("."):
            yield from run_folders(Path(path), levels - 1)


def run_state(folder: Path) -> RunState:
    """The state of one run."""
    changed = folder / CONFIG
    step = 0
    metrics = folder / "metrics.jsonl"
    records = last_records(metrics)
    if records:
        changed = metrics
        step = records[-1]["step"]
    # The last step may have been skipped, and a skipped one has no loss.
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    steps = planned_steps(folder)
    return RunState(
        folder=folder,
        step=step,
        steps=steps,
        loss=losses[-1] if losses else None,
        state=state_of(folder, step, steps),
        checkpoints=complete_steps(folder / "checkpoints"),
        changed=changed.stat().st_mtime,
    )


def planned_steps(folder: Path) -> int | None:
    """train.steps of a run; None if its config cannot be read."""
    try:
        steps = read_yaml(folder / CONFIG)["train"]["steps"]
    except (ConfigError, KeyError, TypeError, RecursionError):
        return None
    return steps if isinstance(steps, int) else None


def state_of(folder: Path, step: int, steps: int | None) -> str:
    """running, done, stopped, not begun or unreadable."""
    # First: a run that writes its last checkpoint has all its steps, and one that loads has none.
    if is_claimed(folder):
        return "running"
    if steps is None:
        return "unreadable"
    if step >= steps:
        return "done"
    return "stopped" if step else "not begun"
