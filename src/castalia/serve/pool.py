"""The models of a server: every checkpoint of the runs it was given, in memory when asked for."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castalia.checkpoint import complete_steps
from castalia.checkpoint.hf import is_hf_folder
from castalia.checkpoint.manifest import step_name
from castalia.core.errors import ConfigError, nearest
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.inference.language_model import LanguageModel
from castalia.inference.loading import load
from castalia.serve.scheduler import Scheduler


@dataclass(frozen=True)
class Place:
    """Where one model lies."""

    path: str
    created: int
    """Seconds since 1970."""


@dataclass
class Loaded:
    """A model in memory, with the thread that owns it."""

    name: str
    model: LanguageModel
    scheduler: Scheduler
    template: ChatTemplate | None
    """The tokenizer's chat template."""


@dataclass(frozen=True)
class Options:
    """How models are loaded and how much they may take on."""

    engine: str = "auto"
    dtype: str | None = None
    slots: int = 16
    most_waiting: int = 256
    keep: int = 1
    """Models in memory at a time."""


class UnknownModelError(ConfigError):
    """A request names a model that is not served."""


class NoTemplateError(ConfigError):
    """A conversation is sent to a model that knows none."""


class Pool:
    """The models by their ids: `NAME` is the newest checkpoint of a run, `NAME@step1000` one of its steps."""

    def __init__(self, paths: Sequence[str], options: Options) -> None:
        """Find the checkpoints, and load the first model.

        Raises  ConfigError if two are called the same; CheckpointError if a path holds no model.
        """
        self.options = options
        self.places: dict[str, Place] = {}
        for path in paths:
            self.add(path)
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        self.lock = threading.Lock()
        self.stopping = False
        self.get(None)

    def add(self, path: str) -> None:
        """The names of what `path` holds."""
        folder, step = Path(path), None
        if "@" in folder.name:
            step = folder.name.split("@")[1]
        name = folder.resolve().name if step is None else folder.name
        if folder.name.startswith("step") and folder.resolve().parent.name == "checkpoints":
            name = (
                f"{folder.resolve().parents[1].name}@step{int(folder.name.removeprefix('step-'))}"
            )
        found = {name: path}
        if folder.is_dir() and not is_hf_folder(folder):
            steps = complete_steps(
                folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
            )
            base = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
            found |= {f"{name}@step{number}": str(base / step_name(number)) for number in steps}
        for each, where in found.items():
            if each in self.places:
                raise ConfigError(
                    f"two models are called {each}: {self.places[each].path} and {where}; rename one"
                )
            created = int(Path(where).stat().st_mtime) if Path(where).exists() else 0
            self.places[each] = Place(where, created)

    def get(self, name: str | None) -> Loaded:
        """A model in memory; it is loaded first if it is not there, and the one that was idle longest makes room.

        Raises  UnknownModelError listing what is served; CheckpointError if a checkpoint is damaged.
        """
        name = next(iter(self.places)) if name is None else name
        if name not in self.places:
            raise UnknownModelError(
                f"no model {name!r}; /v1/models lists what is served{nearest(name, self.places)}"
            )
        with self.lock:
            if name not in self.loaded:
                while len(self.loaded) >= self.options.keep:
                    _, old = self.loaded.popitem(last=False)
                    old.scheduler.close(
                        wait=False
                    )  # its texts are finished first; then the thread lets go of it
                self.loaded[name] = self.load(name)
            self.loaded.move_to_end(name)
            return self.loaded[name]

    def load(self, name: str) -> Loaded:
        """Read a model and start its thread."""
        path = self.places[name].path
        model = load(path, engine=self.options.engine, dtype=self.options.dtype)
        scheduler = Scheduler(
            model.engine,
            slots=self.options.slots,
            length=model.config.max_position_embeddings,
            most_waiting=self.options.most_waiting,
        )
        return Loaded(name, model, scheduler, read_chat_template(Path(path)))

    def close(self) -> None:
        """Finish what runs, and take no more."""
        self.stopping = True
        with self.lock:
            for loaded in self.loaded.values():
                loaded.scheduler.close(wait=False)

    def counts(self) -> tuple[int, int]:
        """Texts that run and texts that wait, over all models."""
        schedulers = [loaded.scheduler for loaded in list(self.loaded.values())]
        return sum(len(one.jobs) for one in schedulers), sum(len(one.waiting) for one in schedulers)
