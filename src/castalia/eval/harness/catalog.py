"""Finding tasks: by the harness's names, in YAML files and in folders of them.

Source  lm-eval 0.4.13, tasks/: manager.py, _index.py, _factory.py. Its index of all tasks takes
        seven seconds, so it is read only for a name that is not among the local files.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from castalia.core.errors import ConfigError, nearest
from castalia.eval.harness.problems import task_problems

ENDINGS = (".yaml", ".yml")
WILDCARDS = "*?["
GROUPED = ("task", "group")


class LocalFactory(TaskFactory):
    """Builds tasks; paths of data in a task's file may be relative to the file."""

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if "task" in config and isinstance(config["task"], str):
            # An older word for a tag, which is of no use to a task.
            config.pop("group", None)
        arguments = config.get("dataset_kwargs")
        if entry.yaml_path and isinstance(arguments, dict):
            folder = Path(entry.yaml_path).parent
            for key in ("data_files", "data_dir"):
                if key in arguments:
                    arguments[key] = beside(arguments[key], folder)
        return config


def beside(value: Any, folder: Path) -> Any:
    """Paths in a value; those that exist in `folder` alone lead there."""
    if isinstance(value, dict):
        return {key: beside(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [beside(part, folder) for part in value]
    if not isinstance(value, str) or "://" in value or Path(value).is_absolute():
        return value
    # The harness itself reads paths relative to the current folder, so that one is asked first.
    is_pattern = any(mark in value for mark in WILDCARDS)
    if not is_pattern and not Path(value).exists() and (folder / value).exists():
        return str(folder / value)
    return value


class Catalog:
    """The tasks that can be named, and those that are.

    `chosen` are the names that `load` takes: what was asked for, with paths and wildcards resolved.
    Raises  ConfigError for an unknown name or a broken file.
    """

    def __init__(self, names: Sequence[str], include: Sequence[str]) -> None:
        self.manager = TaskManager(include_defaults=False)
        self.manager._factory = LocalFactory(meta=None)
        self.index: dict[str, Entry] = self.manager._index
        self.complete = False
        """Whether the harness's own tasks are in the index."""
        for path in include:
            self.add(Path(path))
        chosen: list[str] = []
        for name in names:
            chosen += self.resolve(name)
        self.chosen = list(dict.fromkeys(chosen))

    def resolve(self, name: str) -> list[str]:
        """The names in the index that a name, pattern or path stands for."""
        if is_path(name):
            return self.add(Path(name))
        if any(mark in name for mark in WILDCARDS):
            self.add_own()
            known = [each for each, entry in self.index.items() if entry.kind is not Kind.TAG]
            matching = sorted(fnmatch.filter(known, name))
            if not matching:
                raise ConfigError(f"no task matches {name!r}")
            return self.outermost(matching)
        if name not in self.index:
            self.add_own()
        if name not in self.index:
            hint = nearest(name, self.index)
            raise ConfigError(
                f"unknown task {name!r}{hint}; give a name of lm-evaluation-harness, or the path"
                " of a YAML file of your own"
            )
        return [name]

    def add_own(self) -> None:
        """Add the harness's own tasks; a local task keeps its name."""
        if self.complete:
            return
        self.complete = True
        for name, entry in TaskManager().task_index.items():
            self.index.setdefault(name, entry)

    def add(self, path: Path) -> list[str]:
        """Add a file, or all files of a folder; returns the names in it that are in no group of it.

        Raises  ConfigError if there is no such file, or one is broken.
        """
        if not path.exists():
            raise ConfigError(f"{path}: no such task file or folder")
        files = [path]
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.suffix in ENDINGS)
        names = []
        for file in files:
            config = read_config(file)
            if not any(isinstance(config.get(key), str) for key in GROUPED):
                # A file that others include.
                if file == path:
                    raise ConfigError(f"{path} names no task: it has neither `task` nor `group`")
                continue
            entries: dict[str, Entry] = {}
            TaskIndex.process_cfg(with_tags(config), file.resolve(), entries)
            for name, entry in entries.items():
                if entry.kind is Kind.TAG and name in self.index:
                    self.index[name].tags |= entry.tags
                    continue
                self.index[name] = entry
                if entry.kind is not Kind.TAG:
                    names.append(name)
        if not names:
            raise ConfigError(f"{path} has no task files: no YAML file in it names a task")
        return self.outermost(names)

    def outermost(self, names: Sequence[str]) -> list[str]:
        """Names that are not members of a group among them."""
        members: set[str] = set()
        for name in names:
            if self.index[name].kind is Kind.GROUP:
                members |= set(self.members(name))
        return [name for name in names if name not in members]

    def members(self, name: str) -> Iterator[str]:
        """Names of everything in a group, at any depth."""
        entry = self.index.get(name)
        if entry is None:
            return
        if entry.kind is Kind.TAG:
            yield from entry.tags
            return
        listed = (entry.cfg or {}).get("task")
        if entry.kind is not Kind.GROUP or not isinstance(listed, list):
            return
        for member in listed:
            child = member
            if isinstance(member, dict):
                child = member.get("task") or member.get("group")
            if isinstance(child, str):
                yield child
                yield from self.members(child)

    def load(self, name: str) -> dict[str, Any]:
        """Build the task or group of a name, with its data.

        Raises  ConfigError or DataError that says what is missing, see `task_problems`.
        """
        if any(member not in self.index for member in self.members(name)):
            self.add_own()
        with task_problems(name):
            loaded: dict[str, Any] = dict(self.manager.load([name]))
        return loaded


def is_path(name: str) -> bool:
    """Whether a name is meant as a path."""
    return name.endswith(ENDINGS) or "/" in name or Path(name).is_dir()


def read_config(file: Path) -> dict[str, Any]:
    """A task's file with what it includes; its functions stay names.

    Raises  ConfigError if it is no YAML mapping, or what it includes is missing.
    """
    try:
        config: dict[str, Any] = load_yaml(file, resolve_func=False)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{file} is not a task file of the harness: {error}") from None
    return config


def with_tags(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose `group`, where it is an older word for tags, is `tag`."""
    group = config.get("group")
    if group is None or not isinstance(config.get("task"), str):
        return config
    rest = {key: value for key, value in config.items() if key != "group"}
    tags: list[str] = []
    for value in (config.get("tag"), group):
        if isinstance(value, str):
            tags.append(value)
        elif value is not None:
            tags += value
    return {**rest, "tag": tags}
