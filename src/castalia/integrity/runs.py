"""Folders of runs: the files beside the checkpoints, which are folders of their own."""

from pathlib import Path

from castalia.config.anchor import CONFIG
from castalia.integrity.kinds import FolderKind
from castalia.integrity.logs import check_files

METRICS = "metrics.jsonl"


def recognizes(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / CONFIG).is_file() and (
        (path / "checkpoints").is_dir() or (path / METRICS).is_file()
    )


RUNS = FolderKind("run", recognizes, check_files, whole=False)
