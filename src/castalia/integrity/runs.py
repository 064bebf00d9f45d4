"""Folders of runs: the files beside the checkpoints, which are folders of their own."""

from collections.abc import Iterator
from pathlib import Path

from castalia.config.anchor import CONFIG
from castalia.core.files import CLAIM
from castalia.integrity.kinds import CheckedFile, FolderKind, unlisted

METRICS = "metrics.jsonl"


def recognizes(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / CONFIG).is_file() and (
        (path / "checkpoints").is_dir() or (path / METRICS).is_file()
    )


def check(path: Path) -> Iterator[CheckedFile]:
    """The files of a run that lie in its folder itself."""
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name != CLAIM:
            yield unlisted(file)


RUNS = FolderKind("run", recognizes, check, whole=False)
