"""Where the data of a task comes from, and what to say where it is not there."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from castalia.core.errors import CastaliaError, ConfigError, DataError

WILDCARDS = "*?["
ANSWER_SECONDS = 5.0
"""How long the hub may take to accept a connection."""
DATA_PACKAGES = ("datasets", "huggingface_hub", "requests", "httpx", "pyarrow", "fsspec")
"""Packages whose errors are about data."""


class TaskData(NamedTuple):
    """The data set that a task names."""

    task: str
    path: str | None
    """`json` and its like, a folder, or OWNER/NAME of the hub."""
    name: str | None
    """A part of the data set."""
    file: Path | None
    """The task's YAML file."""

    @classmethod
    def of(cls, config: Mapping[str, Any], file: Path | None) -> "TaskData":
        """The data of a task's config."""
        path = config.get("dataset_path")
        name = config.get("dataset_name")
        return cls(str(config.get("task")), path, name, file)

    @property
    def is_local(self) -> bool:
        """Whether nothing is fetched from the hub."""
        from datasets import packaged_modules

        if self.path is None or Path(self.path).exists():
            return True
        return self.path in packaged_modules._PACKAGED_DATASETS_MODULES

    def __str__(self) -> str:
        if self.name:
            return f"{self.path} ({self.name})"
        return str(self.path)

    def way_out(self) -> str:
        """How to give the data where the hub cannot."""
        if self.is_local:
            return "paths in a task's file are relative to the file or to the current folder"
        lines = [
            f"include: {self.file}",
            f"task: {self.task}_local",
            "dataset_path: json",
            "dataset_name: null",
            "dataset_kwargs: {data_files: {test: FILE.jsonl}}",
        ]
        return (
            "get it once with a network, or name a YAML file of your own whose data is in"
            " FILE.jsonl (`test` stands for the split that the task reads):\n  "
            + "\n  ".join(lines)
        )


def beside(value: Any, folder: Path) -> Any:
    """Paths in a value; those that exist in `folder` alone lead there."""
    if isinstance(value, dict):
        return {key: beside(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [beside(part, folder) for part in value]
    if not isinstance(value, str) or "://" in value or Path(value).is_absolute():
        return value
    # The harness itself reads paths relative to the current folder, so that one is asked first.
    if any(Path().glob(value)) or not any(folder.glob(value)):
        return value
    return str(folder / value)


@lru_cache(maxsize=1)
def hub_answers(endpoint: str) -> bool:
    """Whether the hub can be reached; asked once in a process."""
    if getproxies():
        return True
    address = urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def prepare_for(data: TaskData) -> None:
    """Before data is loaded: without a network the cache alone is asked.

    The hub's client would retry for half a minute. Undone at the end of `local_first`.
    """
    from datasets import config
    from huggingface_hub import constants

    if not data.is_local and not hub_answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        config.HF_HUB_OFFLINE = True


@contextmanager
def local_first() -> Iterator[None]:
    """Data that is here is read without a request, and `prepare_for` may go offline."""
    from datasets import config
    from huggingface_hub import constants

    offline = (constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)
    counts = config.HF_UPDATE_DOWNLOAD_COUNTS
    # datasets reports every use of its reader of JSON to a server.
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = offline


def explained(error: Exception, name: str, data: TaskData | None) -> CastaliaError:
    """An error while the task or group `name` was built, as one sentence with the way out.

    `data` is that of the task that was being built. datasets and huggingface_hub raise dozens of
    kinds of errors.
    """
    if isinstance(error, CastaliaError):
        return error
    task = name
    # A task of a group is named together with the group that was asked for.
    if data is not None and data.task != name:
        task = f"{data.task} of {name}"
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if isinstance(error, ImportError):
        package = "a package"
        if error.name:
            package = f"the package {error.name!r}"
        return ConfigError(
            f"task {task} needs {package}, which cannot be imported ({text}); install it with pip"
        )
    is_about_data = isinstance(error, OSError) or root_of(error) in DATA_PACKAGES
    if is_about_data and data is not None:
        return DataError(f"task {task}: its data {data} cannot be read ({text}); {data.way_out()}")
    return ConfigError(f"task {task} cannot be built: {type(error).__name__}: {text}")


def root_of(error: Exception) -> str:
    """The package that an error's class comes from."""
    return type(error).__module__.split(".")[0]
