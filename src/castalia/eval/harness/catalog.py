"""Finding tasks: by the harness's names, in YAML files and in folders of them.

Source  lm-eval 0.4.13, tasks/: manager.py, _index.py, _factory.py. Its own tasks are
        looked at only for a name that is not among the local files.
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
from castalia.eval.harness.own_tasks import own_tasks
from castalia.eval.harness.sources import (
    WILDCARDS,
    TaskData,
    beside,
    explained,
    prepare_for,
)
from castalia.results.task_hash import PATH_KEYS

ENDINGS = (".yaml", ".yml")
GROUPED = ("task", "group")


class LocalFactory(TaskFactory):
    """Builds tasks; paths of data in a task's file may be relative to the file.

    `unsafe` allows tasks that run code which the model wrote.
    """

    def __init__(self, unsafe: bool) -> None:
        super().__init__(meta=None)
        self.unsafe = unsafe
        self.data: TaskData | None = None
        """The data of the task that is being built."""

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None) -> dict[str, Any]:
        file = None
        if entry.yaml_path:
            file = Path(entry.yaml_path)
        # First without the task's functions: importing them may fail where it should not run.
        plain = {**({} if file is None else read_config(file)), **(overrides or {})}
        if isinstance(plain.get("task"), str):
            self.require_safe(plain)
            self.data = TaskData.of(plain, file)
            prepare_for(self.data)
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if isinstance(config.get("task"), str):
            # An older word for a tag, which is of no use to a task.
            config.pop("group", None)
        arguments = config.get("dataset_kwargs")
        if file is not None and isinstance(arguments, dict):
            for key in PATH_KEYS:
                if key in arguments:
                    arguments[key] = beside(arguments[key], file.parent)
        return config

    def require_safe(self, config: dict[str, Any]) -> None:
        """Raises  ConfigError if the task runs code of the model's and that is not allowed."""
        if config.get("unsafe_code") and not self.unsafe:
            raise ConfigError(
                f"task {config['task']} runs code that the model writes; where that can do no harm,"
                " castalia.eval.open_tasks(…, unsafe=True) allows it"
            )


class Catalog:
    """The tasks that can be named, and those that are.

    `chosen` are the names that `load` takes: what was asked for, with paths and wildcards resolved.
    Raises  ConfigError for an unknown name or a broken file.
    """

    def __init__(
        self, names: Sequence[str], include: Sequence[str], *, unsafe: bool = False
    ) -> None:
        self.manager = TaskManager(include_defaults=False)
        self.factory = LocalFactory(unsafe)
        self.manager._factory = self.factory
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
                raise ConfigError(
                    f"no task of lm-evaluation-harness or of your files matches {name!r}"
                )
            return self.outermost(matching)
        if name not in self.index:
            self.add_own()
        if name not in self.index:
            raise ConfigError(
                f"unknown task {name!r}; give a name of lm-evaluation-harness, or the path of a"
                f" YAML file of your own{nearest(name, self.index)}"
            )
        return [name]

    def add_own(self) -> None:
        """Add the harness's own tasks; a local task keeps its name."""
        if self.complete:
            return
        self.complete = True
        for name, entry in own_tasks().items():
            self.add_entry(name, entry, replaces=False)

    def add_entry(self, name: str, entry: Entry, *, replaces: bool) -> None:
        """Add a name to the index; the tasks of a tag add up."""
        known = self.index.get(name)
        if known is not None and known.kind is entry.kind is Kind.TAG:
            # Another entry, because those of the harness's tasks are shared.
            self.index[name] = Entry(name, Kind.TAG, None, tags=known.tags | entry.tags)
        elif known is None or replaces:
            self.index[name] = entry

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
                self.add_entry(name, entry, replaces=True)
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
        if entry.kind is not Kind.GROUP:
            return
        if entry.cfg is None:
            config = read_config(entry.yaml_path)
        else:
            config = entry.cfg
        listed = config.get("task")
        if not isinstance(listed, list):
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

        Raises  ConfigError if it cannot be built; DataError if its data is not there.
        """
        if any(member not in self.index for member in self.members(name)):
            self.add_own()
        self.factory.data = None
        try:
            return dict(self.manager.load([name]))
        except Exception as error:  # of any package that reads data, and of the task's functions
            raise explained(error, name, self.factory.data) from error


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
