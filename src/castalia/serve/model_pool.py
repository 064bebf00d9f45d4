"""The models of a server: every checkpoint of the given runs, loaded on demand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from castalia.checkpoint import complete_steps
from castalia.checkpoint.hf import DTYPES, is_hf_folder
from castalia.checkpoint.manifest import MANIFEST
from castalia.checkpoint.names import step_name
from castalia.core.errors import ConfigError, nearest, quoted
from castalia.core.memory import available_bytes
from castalia.corpus.conversation import template_of
from castalia.formats.export_record import check_export
from castalia.formats.saved_model import open_adapted, open_model
from castalia.inference.adapted_engine import with_adapter
from castalia.inference.language_model import LanguageModel
from castalia.inference.loading import load
from castalia.inference.torch_engine import TorchEngine
from castalia.serve.loaded_models import LoadedModel, LoadedModels, ModelSource
from castalia.serve.scheduler import Scheduler


@dataclass(frozen=True)
class ModelLocation:
    """The path of one model and its modification time."""

    path: str
    created: int
    """Seconds since 1970; 0 for a model from the hub."""
    base: str | None = None
    """Name of the model that an adapter belongs to; None for a model of its own."""


@dataclass(frozen=True)
class ServeOptions:
    """How models are loaded, and how many texts each accepts."""

    engine: str = "auto"
    dtype: str | None = None
    cache: str | None = None
    slots: int = 16
    """Texts generated at a time."""
    most_waiting: int = 256
    """Texts that may wait in the queue of one model."""
    keep: int = 1
    """Models in memory at a time; one more only while it is being loaded."""
    room: float = 30.0
    """Seconds for which a request waits until others have finished texts and made room."""
    verify: bool = True
    """Whether the files of a model are compared with their recorded hashes."""


class UnknownModelError(ConfigError):
    """A request names a model that this server does not have."""


class NoTemplateError(ConfigError):
    """A chat request to a model without a chat template."""


class ModelPool:
    """Models by name: NAME is the newest checkpoint of a run, NAME@step1000 one of its steps."""

    def __init__(
        self, paths: Sequence[str], options: ServeOptions, adapters: Mapping[str, str] | None = None
    ) -> None:
        """Find all checkpoints and load the first model.

        adapters  runs of adapters or folders of PEFT by the names that requests give, over the one
                  model in `paths`.
        Raises    ConfigError if two models share a name, or adapters have more than one base;
                  CheckpointError if a path holds no model, or an adapter belongs to other weights.
        """
        self.options = options
        self.engine = options.engine
        if adapters and options.engine == "auto" and options.dtype in (None, *DTYPES):
            # It has the weights of the base in memory once for all adapters.
            self.engine = TorchEngine.name
        self.locations: dict[str, ModelLocation] = {}
        for path in paths:
            self.add(path)
        source = ModelSource(
            load=self.load,
            check=self.check,
            needs_room=lambda name: self.shared_base(name) is None,
            fits=self.fits,
        )
        self.models = LoadedModels(source, options.keep, options.room)
        try:
            self.get(None)
            for name, path in (adapters or {}).items():
                self.add_adapter(name, path, paths)
        except BaseException:
            # Its threads would keep the process alive.
            self.close()
            raise

    def add(self, path: str) -> None:
        """Register the model at `path` and, for a run, each of its steps.

        Raises  ConfigError if a name is taken.
        """
        for name, model_path in models_at(path).items():
            if name in self.locations:
                raise ConfigError(
                    f"two models share the name {name}: {self.locations[name].path} and"
                    f" {model_path}; rename one of the folders"
                )
            created = 0
            if Path(model_path).exists():
                created = int(Path(model_path).stat().st_mtime)
            self.locations[name] = ModelLocation(model_path, created)

    def add_adapter(self, name: str, path: str, bases: Sequence[str]) -> None:
        """Register and load an adapter, so that one of other weights is refused at the start.

        Raises  ConfigError, CheckpointError as the constructor.
        """
        problem = None
        if len(bases) != 1:
            problem = f"adapters belong to one base, and the server has {', '.join(bases)}"
        elif name in self.locations:
            problem = f"the name {name} is taken; choose another"
        if problem:
            raise ConfigError(f"--adapter {name}={path}: {problem}")
        created = int(Path(path).stat().st_mtime) if Path(path).exists() else 0
        self.locations[name] = ModelLocation(path, created, base=next(iter(self.locations)))
        self.get(name)

    def get(self, name: str | None) -> LoadedModel:
        """A loaded model, the first one if `name` is None; blocks while it is loaded.

        Raises  UnknownModelError with the nearest name; CheckpointError if a checkpoint is damaged.
        """
        return self.models.get_now(self.name_of(name))

    async def find(self, name: str | None) -> LoadedModel:
        """A loaded model, as `get`, for a request; other requests go on meanwhile.

        Raises  UnknownModelError with the nearest name; LoadingError, whose reason only the log
                has; ModelBusyError if no other model makes room in time.
        """
        return await self.models.get(self.name_of(name))

    @property
    def loaded(self) -> Mapping[str, LoadedModel]:
        """Models in memory, least recently used first."""
        return self.models.ready

    def name_of(self, name: str | None) -> str:
        """A name that this server has, that of the first model if none is given.

        Raises  UnknownModelError with the nearest name.
        """
        if name is None:
            return next(iter(self.locations))
        self.location(name)
        return name

    def location(self, name: str) -> ModelLocation:
        """Where a model is.

        Raises  UnknownModelError with the nearest name.
        """
        if name not in self.locations:
            raise UnknownModelError(
                f"unknown model {quoted(name)}; GET /v1/models lists the models of this server"
                f"{nearest(name, self.locations)}"
            )
        return self.locations[name]

    def shared_base(self, name: str) -> LoadedModel | None:
        """The base in memory whose weights an adapter shares.

        Other engines than torch pack their weights: each adapter is a merged copy there.
        """
        base = self.locations[name].base
        loaded = None if base is None else self.loaded.get(base)
        if loaded is None or not isinstance(loaded.model.engine, TorchEngine):
            return None
        return loaded

    def check(self, name: str) -> None:
        """Compare the hashes of a model's files before other models make room for it.

        Raises  CheckpointError if it is damaged.
        """
        location = self.locations[name]
        if location.base is not None or not self.options.verify:
            return
        if (Path(location.path) / MANIFEST).is_file():
            open_model(location.path)
        else:
            check_export(Path(location.path))

    def fits(self, name: str, other: LoadedModel) -> bool:
        """Whether memory has room for a model beside those that are there, of which one is given.

        Its files are taken for its size; of a step they hold the optimizer too, which leaves room
        for keys and values.
        """
        folder = Path(self.locations[name].path)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if other.model.engine.device.type == "cuda":
            return size < torch.cuda.mem_get_info(other.model.engine.device)[0]
        available = available_bytes()
        return available is None or size < available

    def load(self, name: str) -> LoadedModel:
        """Read a model and start its scheduler."""
        location = self.locations[name]
        base = self.shared_base(name)
        if base is not None:
            base.stays = True
            where = self.locations[base.name].path
            return self.serving(
                name, shared(base.model, where, location.path, self.options.verify), stays=True
            )
        options = self.options
        path = location.path
        adapter = None
        if location.base is not None:
            adapter = path
            path = self.locations[location.base].path
        model = load(
            path,
            engine=self.engine,
            dtype=options.dtype,
            cache=options.cache,
            adapter=adapter,
            verify=options.verify,
        )
        return self.serving(name, model)

    def serving(self, name: str, model: LanguageModel, *, stays: bool = False) -> LoadedModel:
        """A model with its scheduler, started."""
        scheduler = Scheduler(
            model.engine,
            slots=self.options.slots,
            length=model.config.max_position_embeddings,
            most_waiting=self.options.most_waiting,
        )
        return LoadedModel(name, model, scheduler, template_of(model), stays)

    def close(self) -> None:
        """Accept no more texts; the running ones finish."""
        self.models.close()

    @property
    def stopping(self) -> bool:
        """Whether the server is shutting down."""
        return self.models.stopping

    def counts(self) -> tuple[int, int]:
        """Running and waiting texts of all models."""
        running = 0
        waiting = 0
        # A copy: another thread may load a model meanwhile.
        for loaded in list(self.loaded.values()):
            running += loaded.scheduler.texts
            waiting += len(loaded.scheduler.waiting)
        return running, waiting

    def cache_bytes(self) -> int:
        """Bytes of keys and values if every slot were full, of engines that tell them."""
        total = 0
        for loaded in list(self.loaded.values()):
            length = loaded.model.config.max_position_embeddings
            token = loaded.model.engine.token_bytes() or 0
            total += token * length * self.options.slots
        return total


def shared(base: LanguageModel, base_path: str, path: str, verify: bool = True) -> LanguageModel:
    """An adapter over the weights of a torch engine that are in memory already.

    Raises  CheckpointError if it belongs to other weights.
    """
    assert isinstance(base.engine, TorchEngine)
    source = open_adapted(open_model(base_path, check=verify), path, check=verify)
    assert source.adapter is not None
    engine = with_adapter(base.engine, source.adapter)
    return LanguageModel(engine, source.tokenizer, source.step, source.special)


def models_at(path: str) -> dict[str, str]:
    """Name and path of every model that `path` stands for.

    A run gives its newest checkpoint under the run's name and each step as NAME@stepN. A step of a
    run, a Hugging Face folder or a hub id (which may end in @REVISION) is one model.
    """
    folder = Path(path)
    models = {model_name(folder): path}
    if not folder.is_dir() or is_hf_folder(folder):
        return models
    steps_folder = folder
    if (folder / "checkpoints").is_dir():
        steps_folder = folder / "checkpoints"
    for step in complete_steps(steps_folder):
        models[f"{model_name(folder)}@step{step}"] = str(steps_folder / step_name(step))
    return models


def model_name(folder: Path) -> str:
    """The name under which clients request the model at `folder`."""
    resolved = folder.resolve()
    if folder.name.startswith("step") and resolved.parent.name == "checkpoints":
        run = resolved.parents[1].name
        return f"{run}@step{int(folder.name.removeprefix('step-'))}"
    if "@" in folder.name:
        return folder.name
    # Resolved, so that `.` and `..` have a name.
    return resolved.name
