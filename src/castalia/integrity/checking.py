"""Checking whatever lies at a path: the folder itself and the folders of ours in it."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castalia.checkpoint.find import WANTED_STEP, find_checkpoint, folder_of
from castalia.core.errors import ConfigError
from castalia.core.hub import did_you_mean
from castalia.integrity import mirrors
from castalia.integrity.kinds import CheckedFile, FolderKind
from castalia.integrity.registered import FOLDER_KINDS
from castalia.storage.urls import is_url

OnFolder = Callable[[str], object]


@dataclass(frozen=True)
class CheckedFolder:
    """What was found in one folder."""

    path: str
    kind: str
    files: list[CheckedFile]

    @property
    def damaged(self) -> list[CheckedFile]:
        """Files that are not what was written."""
        return [file for file in self.files if file.fault is not None]

    @property
    def uncovered(self) -> list[CheckedFile]:
        """Files for which nothing vouches."""
        return [file for file in self.files if file.fault is None and not file.by]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        files = [file._asdict() for file in self.files]
        return {**asdict(self), "files": files, "ok": not self.damaged}


def check_folders(
    paths: Iterable[str | os.PathLike[str]], on_folder: OnFolder | None = None
) -> Iterator[CheckedFolder]:
    """Check everything of ours at and below the paths; goes on after a fault.

    Raises  ConfigError for a path at which nothing of ours lies.
    """
    for word in paths:
        if is_url(word):
            url = str(word).rstrip("/")
            if on_folder:
                on_folder(url)
            yield CheckedFolder(url, mirrors.NAME, list(mirrors.check_mirror(url)))
            continue
        path = meant(word)
        found = False
        for kind, folder in folders_of_ours(path):
            found = True
            if on_folder:
                on_folder(str(folder))
            yield CheckedFolder(str(folder), kind.name, list(kind.check(folder)))
        if not found:
            raise ConfigError(nothing_at(path))


def meant(word: str | os.PathLike[str]) -> Path:
    """The path that a word names, as every verb reads it: RUN/step1000 is a checkpoint, and
    RUN/config.yaml its run.

    Raises  CheckpointError listing the steps of a run that lacks the named one.
    """
    path = folder_of(Path(word))
    names_step = WANTED_STEP.fullmatch(path.name.rpartition("@")[2])
    # A number may also be the prefix of token files.
    if names_step and not path.exists() and next(folders_of_ours(path), None) is None:
        return find_checkpoint(path)
    return path


def folders_of_ours(path: Path) -> Iterator[tuple[FolderKind, Path]]:
    """Each folder of a known kind at or below a path, the outer ones first."""
    for kind in FOLDER_KINDS.items.values():
        if kind.recognizes(path):
            yield kind, path
            if kind.whole:
                return
    if not path.is_dir():
        return
    for inner in sorted(path.iterdir()):
        # A link may lead to a folder above this one, and so on without an end.
        if inner.is_dir() and not inner.is_symlink():
            yield from folders_of_ours(inner)


def nothing_at(path: Path) -> str:
    """Why a path cannot be checked."""
    known = ", ".join(FOLDER_KINDS)
    if path.exists():
        return f"{path} holds nothing that Castalia wrote with hashes; it checks: {known}"
    return f"no such path {path}; {did_you_mean(path, f'give the folder of one of: {known}')}"
