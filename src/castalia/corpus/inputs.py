"""The files that are to be read, in order: named, below folders, matched by patterns, or behind URLs."""

import glob
import io
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import CastaliaError, DataError
from castalia.core.files import several

STAMPS = ("size", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")
"""What the file systems of fsspec call the size and the age of a file."""
WORK_FOLDER = ".parts"
"""How the folder of a job's unfinished work ends; it holds a file `lock`."""
UNFINISHED = "current_chunk_incomplete"
"""What lm_dataformat calls the file that it still writes; it does not read it either."""


@dataclass(frozen=True)
class InputFile:
    """One input: a local path or a URL.

    `named` says that the user named the file itself, and not a folder around it: then it must not be empty. `stamp` is
    its size and age, by which a resumed job sees that it changed.
    """

    path: str
    named: bool
    size: int
    stamp: str

    @property
    def remote(self) -> bool:
        """Whether fsspec opens it."""
        return "://" in self.path

    @property
    def name(self) -> str:
        """The file's name, which says how it is read; without the query of a URL."""
        last = self.path.rsplit("/", 1)[-1]
        return last.split("?", 1)[0] if self.remote else Path(self.path).name

    def open(self) -> Any:
        """The file's bytes, without a buffer of ours."""
        if not self.remote:
            return open(self.path, "rb", buffering=0)
        return UrlFile(self.path)


class UrlFile(io.RawIOBase):
    """A file behind a URL. What goes wrong on the way is no damage of the file and so never rejected.

    Raises  CastaliaError, on every call.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        system, inner = file_system(url)
        self.file = self.told(system.open, inner, "rb")

    def told(self, call: Any, *words: Any) -> Any:
        """What a call of the file system gives, its errors as ours."""
        try:
            return call(*words)
        except Exception as error:  # each fsspec file system raises its own kinds
            reason = str(error) or type(error).__name__
            raise CastaliaError(
                f"{self.url}: broke off ({reason}); run the same command to go on"
            ) from None

    def readable(self) -> bool:
        """As `io` asks."""
        return True

    def seekable(self) -> bool:
        """As `io` asks."""
        return bool(self.file.seekable())

    def readinto(self, buffer: Any) -> int:
        """As `io` asks."""
        piece = self.told(self.file.read, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """As `io` asks."""
        return int(self.told(self.file.seek, place, whence))

    def tell(self) -> int:
        """As `io` asks."""
        return int(self.told(self.file.tell))

    def close(self) -> None:
        """Let go of the connection."""
        if not self.closed:
            self.file.close()
        super().close()


def local(path: Path, named: bool) -> InputFile:
    """An input on this machine."""
    found = path.stat()
    return InputFile(str(path), named, found.st_size, f"{found.st_size}:{found.st_mtime_ns}")


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
    """The files to read, in order: those named, and for a folder all files below it, sorted, but no hidden ones; links
    to folders are followed.

    A name with *, ? or [ that is no file stands for what it matches, sorted; ** for folders at any depth. A folder that
    `datasets` wrote stands for its Arrow files in their order.
    Raises  DataError if one is missing or cannot be looked at, a pattern matches nothing, or a folder holds no files.
    """
    found: list[InputFile] = []
    for name in several(inputs):
        if not os.fspath(name):
            raise DataError("an input without a name; name a file or a folder, `.` for this one")
        try:
            found += (
                behind_url(os.fspath(name)) if "://" in os.fspath(name) else on_disk(Path(name))
            )
        except OSError as error:
            raise DataError(
                f"{error.filename or name}: cannot be read: {error.strerror or error}"
            ) from None
    if not found:
        raise DataError("no input files; name at least one file or folder")
    return found


def on_disk(path: Path) -> list[InputFile]:
    """The local files that a name stands for."""
    if path.is_dir():
        return below(path)
    if path.is_file():
        return [local(path, named=True)]
    if path.exists():
        raise DataError(
            f"{path}: a pipe or a device; it is read more than once, so write it to a file first"
        )
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    for match in matches:
        require_target(match)
    if not (files := [match for match in matches if match.is_file() and not is_ours(match)]):
        raise DataError(f"{path}: no file matches this pattern")
    return [local(match, named=False) for match in files]


def below(folder: Path) -> list[InputFile]:
    """The files of a folder."""
    if (folder / "dataset_dict.json").is_file():
        return below(only_split(folder))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [local(path, named=False) for path in arrow_files(folder)]
    if not (files := [path for path in sorted(files_in(folder)) if not is_ours(path)]):
        raise DataError(f"{folder}: a folder without files")
    return [local(path, named=False) for path in files]


def files_in(top: Path) -> Iterator[Path]:
    """The files of a folder and of those below it, but no hidden ones. Each folder is read once, under its own name
    unless links alone lead to it.

    Raises  OSError if a folder may not be read: what it holds would be missing; DataError about a link to nothing.
    """
    seen: set[str] = set()
    folders, links = [top], deque[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            require_target(path)
            if path.is_file():
                yield path
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)


def require_target(path: Path) -> None:
    """A link leads to something.

    Raises  DataError if it does not: what it stands for would be missing.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there")


def is_ours(path: Path) -> bool:
    """Whether a file is part of unfinished work, of a job of ours or of lm_dataformat, and not one of the inputs."""
    work = [folder for folder in path.parents if folder.name.endswith(WORK_FOLDER)]
    return path.name == UNFINISHED or any((folder / "lock").is_file() for folder in work)


def only_split(folder: Path) -> Path:
    """The one split of a DatasetDict; of several the user names one."""
    splits = read_json(folder / "dataset_dict.json").get("splits")
    names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
    if len(names) != 1:
        listed = ", ".join(str(folder / name) for name in names) or "none"
        raise DataError(
            f"{folder}: a datasets folder of several splits; name the one to read: {listed}"
        )
    return inside(folder, names[0], "dataset_dict.json")


def arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in their order."""
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder}: this dataset is reordered by an index; save it after flatten_indices()"
        )
    files = state.get("_data_files")
    names = (
        [item.get("filename") for item in files if isinstance(item, dict)]
        if isinstance(files, list)
        else []
    )
    if not names:
        raise DataError(f"{folder}: state.json names no data files")
    return [inside(folder, name, "state.json") for name in names]


def inside(folder: Path, name: Any, manifest: str) -> Path:
    """A file or folder directly in `folder`, as its manifest names it.

    Raises  DataError if the name leads elsewhere or nothing is there.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or Path(name).name != name
        or "\x00" in name
    ):
        raise DataError(
            f"{folder / manifest}: the name {name!r} leads out of the folder; such manifests are refused"
        )
    path = folder / name
    if not path.exists():
        raise DataError(f"{path}: missing, though {manifest} names it")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def behind_url(url: str) -> list[InputFile]:
    """The files that a URL stands for: itself, what it matches, or the files below it."""
    system, path = file_system(url)
    scheme = url.split("://", 1)[0]
    try:
        if glob.has_magic(path) and "?" not in url:
            names = sorted(system.glob(path))
        elif scheme not in ("http", "https") and system.isdir(path):
            names = sorted(system.find(path))
        else:
            return [stamped(system, path, url, named=True)]
        if not names:
            raise DataError(f"{url}: no file matches")
        return [stamped(system, name, system.unstrip_protocol(name), named=False) for name in names]
    except FileNotFoundError as error:
        cause = error.__cause__  # a server that does not answer or refuses is "not found" to fsspec
        why = (
            "no such file"
            if cause is None or isinstance(cause, FileNotFoundError)
            else f"cannot be read: {cause}"
        )
        raise DataError(f"{url}: {why}") from None
    except DataError:
        raise
    except Exception as error:  # each fsspec file system raises its own kinds
        raise DataError(f"{url}: cannot be read: {str(error) or type(error).__name__}") from None


def stamped(system: Any, path: str, url: str, named: bool) -> InputFile:
    """A remote input with what its file system says about size and age."""
    facts = system.info(path)
    stamp = ":".join(str(facts[name]) for name in STAMPS if facts.get(name) is not None)
    return InputFile(url, named, int(facts.get("size") or 0), stamp)
