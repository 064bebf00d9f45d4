"""monitors/NAME.json of a run folder: what a sink was given, so that a resume continues there."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, read_json

FOLDER = "monitors"
"""Folder of the records in that of the run."""
HASH = "sha256"


@dataclass
class Record:
    """How far a sink is, and what it keeps for itself.

    Fields  delivered: the last step that it has; tables: the last step whose table it has; files:
            SHA-256 of each file that it has, by name; kept: its own values.
    """

    path: Path
    delivered: int = 0
    tables: int = 0
    files: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Read the file, if there is one.

        Raises  DataError if it is damaged.
        """
        if not self.path.exists():
            return
        values = read_json(self.path)
        if fault := fault_of(values, self.path):
            raise DataError(fault)
        self.delivered = values["delivered"]
        self.tables = values["tables"]
        self.files = values["files"]
        self.kept = values["kept"]

    def save(self) -> None:
        """Write the file.

        Raises  CastaliaError if it cannot be written.
        """
        values = {
            "delivered": self.delivered,
            "tables": self.tables,
            "files": self.files,
            "kept": self.kept,
        }
        # Not forced to the disk: it is written each second, and after a power cut the service
        # itself, or its own file, says what it has.
        with atomic_write(self.path, synced=False) as file:
            json.dump({**values, HASH: hash_of(values)}, file, indent=1)
            file.write("\n")


def hash_of(values: dict[str, Any]) -> str:
    """SHA-256 of the values of a record."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def fault_of(values: dict[str, Any], path: Path) -> str | None:
    """Why the values of a record are not what was written; None if they are."""
    content = {name: value for name, value in values.items() if name != HASH}
    if values.get(HASH) != hash_of(content):
        return f"{path} is damaged: its SHA-256 is not that of its content"
    return None


def record_fault(path: Path) -> str | None:
    """Why a file of the folder `monitors` is not a record as it was written; None if it is."""
    try:
        return fault_of(read_json(path), path)
    except DataError as error:
        return str(error)
