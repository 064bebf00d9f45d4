"""The files to read, in order: named, in folders, matched by patterns, or behind URLs."""

import glob
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import CastaliaError, DataError
from castalia.core.files import read_json, several
from castalia.core.secrets import redacted_url

STAMP_KEYS = ("size", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")
"""Names that the file systems of fsspec give to the size and the age of a file."""
WORK_FOLDER = ".parts"
"""Suffix of the folder with a job's unfinished work; it holds a file named `lock`."""
UNFINISHED = "current_chunk_incomplete"
"""Name of the file that lm_dataformat is still writing; its own reader skips it as well."""


@dataclass(frozen=True)
class InputFile:
    """One input: a local path or a URL."""

    path: str
    named: bool
    """Whether the user named this file, not a folder or pattern around it: then it must not be
    empty."""
    size: int
    """In bytes; 0 if the server does not tell."""
    stamp: str
    """Size and age, by which a resumed job detects a changed file."""

    @property
    def remote(self) -> bool:
        """Whether the input is a URL, opened by fsspec."""
        return "://" in self.path

    @property
    def shown(self) -> str:
        """The path as records have it: without the password and the keys of a URL."""
        return redacted_url(self.path) if self.remote else self.path

    @property
    def name(self) -> str:
        """The file name, which decides the format; the query of a URL is no part of it."""
        if not self.remote:
            return Path(self.path).name
        last = self.path.rsplit("/", 1)[-1]
        return last.split("?", 1)[0]

    def open(self) -> Any:
        """The file, opened for reading bytes, unbuffered: callers read in large chunks."""
        if not self.remote:
            return open(self.path, "rb", buffering=0)
        return UrlFile(self.path)


class UrlFile(io.RawIOBase):
    """A file behind a URL.

    A broken connection is not damage of the file: it ends the job and is never rejected.
    Raises  CastaliaError, on every call.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        system, inner = file_system(url)
        self.file = self.call(system.open, inner, "rb")

    def call(self, method: Any, *args: Any) -> Any:
        """Call a method of the file system; its errors become a CastaliaError."""
        try:
            return method(*args)
        except Exception as error:  # each fsspec file system raises its own kinds
            reason = str(error) or type(error).__name__
            raise CastaliaError(
                f"{self.url}: the connection broke ({reason}); run the same command to continue"
            ) from None

    def readable(self) -> bool:
        """As `io` requires."""
        return True

    def seekable(self) -> bool:
        """As `io` requires."""
        return bool(self.file.seekable())

    def readinto(self, buffer: Any) -> int:
        """As `io` requires."""
        data = self.call(self.file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """As `io` requires."""
        return int(self.call(self.file.seek, place, whence))

    def tell(self) -> int:
        """As `io` requires."""
        return int(self.call(self.file.tell))

    def close(self) -> None:
        """Close the connection."""
        if not self.closed:
            self.file.close()
        super().close()


def local_file(path: Path, named: bool) -> InputFile:
    """An input on this machine."""
    status = path.stat()
    return InputFile(str(path), named, status.st_size, f"{status.st_size}:{status.st_mtime_ns}")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises  DataError if the scheme is unknown or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened: {error}") from None
    return system, path


def list_files(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[InputFile]:
    """The files to read, in order.

    A folder stands for all files below it, sorted, without hidden ones; links to folders are
    followed. A folder written by `datasets` stands for its Arrow files, in their order. A name with
    *, ? or [ that is not a file is a pattern and stands for its matches, sorted; ** matches folders
    at any depth.
    Raises  DataError if a file is missing or unreadable, a pattern matches nothing, or a folder has
            no files.
    """
    files: list[InputFile] = []
    for name in several(inputs):
        text = os.fspath(name)
        if not text:
            raise DataError("an input has an empty name; name a file or folder, `.` for this one")
        try:
            if "://" in text:
                files += remote_files(text)
            else:
                files += local_files(Path(name))
        except OSError as error:
            raise DataError(
                f"{error.filename or name}: cannot be read: {error.strerror or error}"
            ) from None
    if not files:
        raise DataError("no input files; name at least one file or folder")
    return files


def local_files(path: Path) -> list[InputFile]:
    """The local files that a name stands for."""
    if path.is_dir():
        return files_of_folder(path)
    if path.is_file():
        return [local_file(path, named=True)]
    if path.exists():
        raise DataError(
            f"{path} is a pipe or a device, which cannot be read twice; write it to a file first"
        )
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    for match in matches:
        require_target(match)
    files = [match for match in matches if match.is_file() and not is_unfinished_work(match)]
    if not files:
        raise DataError(f"{path}: no file matches this pattern")
    return [local_file(match, named=False) for match in files]


def files_of_folder(folder: Path) -> list[InputFile]:
    """The files that a folder stands for."""
    if (folder / "dataset_dict.json").is_file():
        return files_of_folder(only_split(folder))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        paths = arrow_files(folder)
    else:
        paths = [path for path in sorted(walk(folder)) if not is_unfinished_work(path)]
        if not paths:
            raise DataError(f"{folder}: the folder has no files")
    return [local_file(path, named=False) for path in paths]


def walk(top: Path) -> Iterator[Path]:
    """All files below a folder, without hidden ones.

    Real folders go before links: so each folder is read once, under its own name unless only links
    lead to it. This also ends on a cycle of links.
    Raises  OSError if a folder cannot be read, since its files would be missing; DataError about a
            broken link.
    """
    visited: set[str] = set()
    folders = [top]
    links: deque[Path] = deque()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            require_target(path)
            if path.is_file():
                yield path
            elif path.is_symlink():
                if path.is_dir():
                    links.append(path)
            elif path.is_dir():
                folders.append(path)


def require_target(path: Path) -> None:
    """Require that a link leads to something.

    Raises  DataError about a broken link: skipping it would silently lose data.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: broken link to {os.readlink(path)}; restore the target or remove the link"
        )


def is_unfinished_work(path: Path) -> bool:
    """Whether a file belongs to unfinished work, of Castalia or of lm_dataformat: not an input."""
    if path.name == UNFINISHED:
        return True
    folders = [folder for folder in path.parents if folder.name.endswith(WORK_FOLDER)]
    return any((folder / "lock").is_file() for folder in folders)


def only_split(folder: Path) -> Path:
    """The only split of a DatasetDict.

    Raises  DataError if there are several: the user must name one.
    """
    splits = read_json(folder / "dataset_dict.json").get("splits")
    names: list[str] = []
    if isinstance(splits, list):
        names = [name for name in splits if isinstance(name, str)]
    if len(names) != 1:
        listed = ", ".join(str(folder / name) for name in names) or "none"
        raise DataError(
            f"{folder} is a datasets folder of {len(names)} splits; name the one to read: {listed}"
        )
    return member_path(folder, names[0], "dataset_dict.json")


def arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in their order."""
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder}: the dataset is reordered by an index, which is not supported; save it again"
            " after flatten_indices()"
        )
    entries = state.get("_data_files")
    names: list[Any] = []
    if isinstance(entries, list):
        names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    if not names:
        raise DataError(f"{folder}: state.json names no data files; save the dataset again")
    return [member_path(folder, name, "state.json") for name in names]


def member_path(folder: Path, name: Any, manifest: str) -> Path:
    """A file or folder directly in `folder` that its manifest names.

    Raises  DataError if the name leads out of the folder, or nothing is there.
    """
    if not isinstance(name, str) or not is_plain_name(name):
        raise DataError(
            f"{folder / manifest}: the name {name!r} leads out of the folder; such manifests are"
            " refused"
        )
    path = folder / name
    if not path.exists():
        raise DataError(f"{path} is missing, but {manifest} names it; save the dataset again")
    return path


def is_plain_name(name: str) -> bool:
    """Whether a name is a single path component other than `.` and `..`."""
    return name not in ("", ".", "..") and Path(name).name == name and "\x00" not in name


def remote_files(url: str) -> list[InputFile]:
    """The files that a URL stands for: itself, the matches of a pattern, or all files below it."""
    system, path = file_system(url)
    scheme = url.split("://", 1)[0]
    try:
        # `?` begins the query of a URL, so a URL with one is never a pattern.
        if glob.has_magic(path) and "?" not in url:
            names = sorted(system.glob(path))
        elif scheme not in ("http", "https") and system.isdir(path):
            names = sorted(system.find(path))
        else:
            return [remote_file(system, path, url, named=True)]
        if not names:
            raise DataError(f"{url}: no file matches")
        return [
            remote_file(system, name, system.unstrip_protocol(name), named=False) for name in names
        ]
    except FileNotFoundError as error:
        # To fsspec, a server that does not answer or refuses is "not found" as well.
        cause = error.__cause__
        reason = "no such file"
        if cause is not None and not isinstance(cause, FileNotFoundError):
            reason = f"cannot be read: {cause}"
        raise DataError(f"{url}: {reason}") from None
    except DataError:
        raise
    except Exception as error:  # each fsspec file system raises its own kinds
        raise DataError(f"{url}: cannot be read: {str(error) or type(error).__name__}") from None


def remote_file(system: Any, path: str, url: str, named: bool) -> InputFile:
    """A remote input, with the size and age that its file system reports."""
    facts = system.info(path)
    stamp = ":".join(str(facts[key]) for key in STAMP_KEYS if facts.get(key) is not None)
    return InputFile(url, named, int(facts.get("size") or 0), stamp)
