"""The checkpoints of one model in the order of their steps: a run, a folder of revisions, or the
hub's cache."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from castalia.checkpoint.find import complete_steps, folder_of, remedy
from castalia.checkpoint.hf import is_hf_folder
from castalia.checkpoint.hf.weights import stored_weights
from castalia.checkpoint.manifest import read_manifest
from castalia.checkpoint.names import step_name
from castalia.checkpoint.tensors import CheckpointTensor, FileTensor, checkpoint_tensors
from castalia.config.base import check
from castalia.core.errors import CheckpointError
from castalia.eval.labels import STEP_FOLDER, config_of_run, is_run, run_around
from castalia.formats.foreign import is_foreign
from castalia.formats.saved_model import open_model
from castalia.runs.config import RunConfig

MAIN = "main"
"""The branch of a hub repository that serves the finished model."""
WHOLE = "weights"
"""Stands for a file where a format does not say which file holds a tensor."""
HUB_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")


class Revision(NamedTuple):
    """One checkpoint."""

    name: str
    """As the user knows it: `step1000`, `main`."""
    step: int | None
    """None where the name does not say it."""
    folder: Path


@dataclass(frozen=True)
class Series:
    """One model and its checkpoints, ascending by step; those without a step come last."""

    name: str
    folder: Path
    revisions: tuple[Revision, ...]
    run: Path | None = None
    """The run that the weights come from, where they lie in its folder."""
    is_run: bool = False
    """Whether the revisions are checkpoints of that run, rather than exports of them."""

    def config(self) -> RunConfig | None:
        """The config of the run; None without one, or where this version cannot build it."""
        if self.run is None:
            return None
        config, _ = check(RunConfig, config_of_run(self.run))
        return config


class Stored(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""

    def whole(self) -> tuple[str, Tensor]:
        """The file that holds it, and its elements as they are stored."""


@dataclass(frozen=True)
class OfRun:
    """A tensor of a run's checkpoint."""

    tensor: CheckpointTensor
    lock: Any
    """Keeps the checkpoint from being deleted as long as it may be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Stored`."""
        return self.tensor.shape

    def whole(self) -> tuple[str, Tensor]:
        """See `Stored`; the files of a tensor in several pieces are joined by +."""
        files = sorted({chunk.file for chunk in self.tensor.entry.chunks})
        return "+".join(files), self.tensor[tuple(slice(0, size) for size in self.shape)]


@dataclass(frozen=True)
class OfFile:
    """A tensor of a Hugging Face folder, under its name there."""

    tensor: FileTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Stored`."""
        return self.tensor.stored_shape

    def whole(self) -> tuple[str, Tensor]:
        """See `Stored`."""
        return self.tensor.file.name, self.tensor.read()


@dataclass(frozen=True)
class OfModel:
    """A tensor of any other format, under Castalia's name."""

    tensors: Mapping[str, Tensor]
    name: str
    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Stored`."""
        return self.size

    def whole(self) -> tuple[str, Tensor]:
        """See `Stored`."""
        return WHOLE, self.tensors[self.name]


def stored(revision: Revision, is_run: bool) -> dict[str, Stored]:
    """Every tensor of the weights of a revision by its name, not read yet.

    Raises  CheckpointError if a file is missing or not whole.
    """
    if is_run:
        opened = checkpoint_tensors(revision.folder, read_manifest(revision.folder))
        out: dict[str, Stored] = {}
        for name, tensor in opened.tensors.items():
            assert isinstance(tensor, CheckpointTensor)
            out[name] = OfRun(tensor, opened.lock)
        return out
    if is_hf_folder(revision.folder) or not is_foreign(revision.folder):
        return {name: OfFile(file) for name, file in stored_weights(revision.folder).items()}
    tensors = open_model(revision.folder).tensors
    return {name: OfModel(tensors, name, tensors.stored(name).shape) for name in tensors}


def series_in(paths: Sequence[str]) -> list[Series]:
    """The models that paths name, each once: runs, folders of revisions, the hub's cache, single
    models, or folders of these.

    Raises  CheckpointError for a path that holds none.
    """
    found: dict[Path, Series] = {}
    for path in paths:
        members = members_of(folder_of(path))
        if not members:
            raise CheckpointError(
                f"{path} holds no checkpoint: expected a run, a folder with step0, step1000, ... of"
                f" one model, or a folder of these{remedy(Path(path))}"
            )
        for series in members:
            # A model that two paths name is not a copy of another one.
            found.setdefault(series.folder.resolve(), series)
    return distinct(list(found.values()))


def distinct(members: list[Series]) -> list[Series]:
    """The models with names of their own: runs/a/small and runs/b/small keep their folders."""
    names = [series.name for series in members]
    out = []
    for series in members:
        if names.count(series.name) > 1:
            series = replace(series, name=str(series.folder))
        out.append(series)
    return out


def members_of(folder: Path) -> list[Series]:
    """The models in a folder, itself or what lies directly in it."""
    own = series_at(folder)
    if own is not None:
        return [own]
    if not folder.is_dir():
        return []
    inner = sorted(item for item in folder.iterdir() if item.is_dir())
    each = (series_at(item) for item in inner if not item.name.startswith("."))
    return [series for series in each if series is not None]


def series_at(folder: Path) -> Series | None:
    """The model that one folder holds; None if it holds none."""
    if not folder.is_dir():
        return None
    around = run_around(folder.absolute())
    if around is not None and folder.name == "checkpoints":
        return of_run(folder.parent)
    if is_run(folder.absolute()):
        return of_run(folder)
    cached = of_cache(folder)
    if cached is not None:
        return cached
    revisions = step_folders(folder)
    if revisions:
        return Series(name_of(folder, around), folder, revisions, around)
    if is_hf_folder(folder) or is_foreign(folder):
        only = Revision(folder.name, step_of(folder.name), folder)
        return Series(name_of(folder, around), folder, (only,), around)
    return None


def step_of(name: str) -> int | None:
    """The step that a folder or a branch is named after."""
    named = STEP_FOLDER.fullmatch(name)
    if named is None:
        return None
    return int(named[1])


def name_of(folder: Path, run: Path | None) -> str:
    """The name of a model in a folder, or of an export of a run."""
    if run is None:
        return folder.absolute().name
    return "/".join((run.name, *folder.absolute().relative_to(run).parts))


def of_run(folder: Path) -> Series:
    """A run with its complete checkpoints."""
    revisions = tuple(
        Revision(f"step{step}", step, folder / "checkpoints" / step_name(step))
        for step in complete_steps(folder / "checkpoints")
    )
    run = folder.absolute()
    return Series(run.name, folder, revisions, run, is_run=True)


def step_folders(folder: Path) -> tuple[Revision, ...]:
    """The sub-folders that are named after steps, and `main`; whole or not."""
    found: list[Revision] = []
    for item in sorted(folder.iterdir()):
        step = step_of(item.name)
        if item.is_dir() and (step is not None or item.name == MAIN):
            found.append(Revision(item.name, step, item))
    if all(revision.step is None for revision in found):
        return ()
    return ascending(found)


def of_cache(folder: Path) -> Series | None:
    """A model in the cache of the hub, whose `refs` name the commits in `snapshots`."""
    named = HUB_CACHE.fullmatch(folder.absolute().name)
    if named is None or not (folder / "snapshots").is_dir():
        return None
    found: list[Revision] = []
    for ref in sorted((folder / "refs").glob("*")):
        step = step_of(ref.name)
        place = folder / "snapshots" / ref.read_text(encoding="utf-8").strip()
        if place.is_dir() and (step is not None or ref.name == MAIN):
            found.append(Revision(ref.name, step, place))
    return Series(f"{named['owner']}/{named['name']}", folder, ascending(found))


def ascending(revisions: list[Revision]) -> tuple[Revision, ...]:
    """Ordered by step, those without one last."""
    return tuple(sorted(revisions, key=lambda each: (each.step is None, each.step or 0)))
