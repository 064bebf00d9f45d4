"""The append-only logs of a run, as its checkpoints rely on them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.core.errors import CheckpointError
from castalia.core.files import cannot_write, on_disk
from castalia.core.log_lines import LineLog

FOLDERS = ("", "samples", "evals")
"""Folders of a run whose files a checkpoint relies on: their entries are forced to the disk."""


@dataclass
class RunLogs:
    """What a checkpoint says of the logs beside it, and how they reach the disk before it does.

    Only the leading rank has logs. As a state of the run it keeps how far each log had come; a
    resume compares before it continues them. The checksums are in the lines themselves, since the
    times in metrics.jsonl would make two checkpoints of equal runs differ.
    """

    folder: Path
    logs: list[Callable[[], LineLog | None]] = field(default_factory=list)
    """Each gives a log as it is open now."""
    expected: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the checkpoint that was loaded says of the logs; empty for one of an older version."""

    def add(self, log: Callable[[], LineLog | None]) -> None:
        """Take in a log that a hook writes; None while it is not open."""
        self.logs.append(log)

    def open_logs(self) -> list[LineLog]:
        """The logs that have lines."""
        found = [log() for log in self.logs]
        return [log for log in found if log is not None and log.lines]

    def state_dict(self) -> dict[str, Any]:
        """Lines of each log, and the step of the last one, by file name."""
        return {log.path.name: {"lines": log.lines, "step": log.step} for log in self.open_logs()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what the logs must have."""
        self.expected = state

    def least(self, name: str) -> int | None:
        """The last step that a log must have; None if the checkpoint does not say."""
        return self.expected.get(name, {}).get("step")

    def copies(self) -> dict[str, str]:
        """The newest lines of the logs that the checkpoint keeps a copy of, by file name."""
        return {log.path.name: log.copy() for log in self.open_logs() if log.copied}

    def sync(self) -> None:
        """Force every log to the disk, and the entries of the folders that they are in.

        Called before a checkpoint is complete, in the thread that writes it.
        Raises  CheckpointError naming what the disk did not take.
        """
        places = [log.path for log in self.open_logs()]
        places += [self.folder / name for name in FOLDERS if (self.folder / name).is_dir()]
        for place in places:
            try:
                on_disk(place)
            except OSError as error:
                raise CheckpointError(f"{cannot_write(place, error)}") from error
