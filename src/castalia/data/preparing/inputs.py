"""The files that are to be read, in order: named, below folders, matched by patterns, or behind URLs."""

import glob
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError

STAMPS = ("size", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")
"""What the file systems of fsspec call the size and the age of a file."""


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
        system, inner = file_system(self.path)
        return system.open(inner, "rb")


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


def list_files(inputs: Iterable[str | os.PathLike[str]]) -> list[InputFile]:
    """The files to read, in order: those named, and for a folder all files below it, sorted, but no hidden ones.

    A name with *, ? or [ that is no file stands for what it matches, sorted; ** for folders at any depth. A folder that
    `datasets` wrote stands for its Arrow files in their order.
    Raises  DataError if one is missing, a pattern matches nothing, or a folder holds no files.
    """
    found: list[InputFile] = []
    for name in inputs:
        found += behind_url(os.fspath(name)) if "://" in os.fspath(name) else on_disk(Path(name))
    if not found:
        raise DataError("no input files; name at least one file or folder")
    return found


def on_disk(path: Path) -> list[InputFile]:
    """The local files that a name stands for."""
    if path.exists():
        return below(path) if path.is_dir() else [local(path, named=True)]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not (files := [match for match in matches if match.is_file()]):
        raise DataError(f"{path}: no file matches this pattern")
    return [local(match, named=False) for match in files]


def below(folder: Path) -> list[InputFile]:
    """The files of a folder."""
    if (folder / "dataset_dict.json").is_file():
        return below(only_split(folder))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [local(path, named=False) for path in arrow_files(folder)]
    inside = sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.relative_to(folder)))
    if not inside:
        raise DataError(f"{folder}: a folder without files")
    return [local(path, named=False) for path in inside]


def only_split(folder: Path) -> Path:
    """The one split of a DatasetDict; of several the user names one."""
    splits = read_json(folder / "dataset_dict.json").get("splits")
    names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
    if len(names) != 1:
        listed = ", ".join(str(folder / name) for name in names) or "none"
        raise DataError(f"{folder}: a datasets folder of several splits; name the one to read: {listed}")
    return inside(folder, names[0], "dataset_dict.json")


def arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in their order."""
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{folder}: this dataset is reordered by an index; save it after flatten_indices()")
    files = state.get("_data_files")
    names = [item.get("filename") for item in files if isinstance(item, dict)] if isinstance(files, list) else []
    if not names:
        raise DataError(f"{folder}: state.json names no data files")
    return [inside(folder, name, "state.json") for name in names]


def inside(folder: Path, name: Any, manifest: str) -> Path:
    """A file or folder directly in `folder`, as its manifest names it.

    Raises  DataError if the name leads elsewhere or nothing is there.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\x00" in name:
        raise DataError(f"{folder / manifest}: the name {name!r} leads out of the folder; such manifests are refused")
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


def is_hidden(path: Path) -> bool:
    """Whether the name of the file or of a folder around it starts with a dot."""
    return any(part.startswith(".") for part in path.parts)


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
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except DataError:
        raise
    except Exception as error:  # each fsspec file system raises its own kinds
        raise DataError(f"{url}: cannot be read: {str(error) or type(error).__name__}") from None


def stamped(system: Any, path: str, url: str, named: bool) -> InputFile:
    """A remote input with what its file system says about size and age."""
    facts = system.info(path)
    stamp = ":".join(str(facts[name]) for name in STAMPS if facts.get(name) is not None)
    return InputFile(url, named, int(facts.get("size") or 0), stamp)
