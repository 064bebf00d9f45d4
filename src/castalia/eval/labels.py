"""What the rows of one checkpoint have in common: suite, model, seed, step, arithmetic."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from castalia.checkpoint.find import complete_steps, folder_of
from castalia.checkpoint.names import step_name
from castalia.config import read_yaml
from castalia.config.anchor import CONFIG, STEP, run_folder_of
from castalia.core.errors import CastaliaError
from castalia.core.hub import HUB_ID, is_hub_id
from castalia.inference.engine import Engine
from castalia.inference.engines import engine_of_export
from castalia.inference.exported import open_export
from castalia.inference.language_model import LanguageModel
from castalia.inference.loading import engine_for, is_read_as_model
from castalia.inference.native_engine import NativeEngine
from castalia.models import ModelConfig, build_model_config, parameter_counts
from castalia.results import Labels

STEP_FOLDER = re.compile(r"(?:global_)?step-?(\d+)")
"""`step1000` of revisions and exports, `step-00001000`, GPT-NeoX's `global_step1000`."""
SIZE = re.compile(r"(?<![a-z0-9.])\d+(?:\.\d+)?[mb](?![a-z0-9])", re.IGNORECASE)
"""The size in a name: `70m` of pythia-70m-deduped, `1.4b`."""
INSIDE = ("checkpoints", "exports")
"""Folders of a run whose content is the run's model."""
GGUF_NAME = "model"
"""Stem of the GGUF files of exports, which does not name their model."""


class Origin(NamedTuple):
    """What a path says about its model before anything is opened."""

    suite: str
    model: str
    run: Path | None
    """The run folder; None for a model without one."""
    step: int | None
    """The step that the path names."""


def labels_of(path: str | os.PathLike[str], model: LanguageModel) -> Labels:
    """The labels of a checkpoint that was loaded, or of a model that is still in training.

    path  as `castalia.load` takes it; a run folder with the model of any of its steps.
    """
    origin = origin_of(path)
    step = origin.step
    if model.step is not None:
        step = model.step
    return labels_at(path, origin, step, model.config)._replace(
        dtype=arithmetic(model.engine), engine=model.engine.name
    )


def labels_ahead(path: str | os.PathLike[str]) -> Labels:
    """The labels of a step of a run, without its engine: no weight is read."""
    origin = origin_of(path)
    assert origin.run is not None, path
    values = config_of_run(origin.run).get("model") or {}
    config = build_model_config(values, os.fspath(path))
    return labels_at(path, origin, origin.step, config)


def labels_at(
    path: str | os.PathLike[str], origin: Origin, step: int | None, config: ModelConfig
) -> Labels:
    """The labels of one step of a model, without its engine."""
    facts: dict[str, Any] = {}
    if origin.run is not None:
        facts = facts_of_run(origin.run)
    per_step = facts.pop("tokens_per_step", None)
    tokens = None
    if per_step is not None and step is not None:
        tokens = step * per_step
    return Labels(
        suite=origin.suite,
        model=origin.model,
        size=size_in(origin.model),
        parameters=parameter_counts(config).total,
        step=step,
        tokens=tokens,
        checkpoint=pinned(path, origin, step),
        **facts,
    )


def origin_of(path: str | os.PathLike[str]) -> Origin:
    """Suite, model, run and step that a path names.

    A run or what lies in its `checkpoints` and `exports` is of the suite that is named like the
    folder around the run. OWNER/NAME of the hub is of the suite OWNER. Any other folder is of the
    suite that is named like the folder around it.
    """
    text = os.fspath(path)
    if is_hub_id(text):
        parts = HUB_ID.fullmatch(text)
        assert parts is not None, text
        owner, name = parts["name"].split("/")
        return Origin(owner, name, None, step_in(parts["revision"] or ""))
    place = Path(os.path.abspath(folder_of(text)))
    run = run_around(place)
    if run is not None:
        return Origin(run.parent.name, run.name, run, step_in(place.name))
    folder = place
    name = place.name
    if place.suffix == ".gguf" and place.stem != GGUF_NAME:
        name = place.stem
    elif place.suffix == ".gguf":
        folder = place.parent
        name = folder.name
    # The folder of a step is no model: its parent is, or the one around `checkpoints`.
    elif STEP_FOLDER.fullmatch(place.name):
        if place.parent.name in INSIDE:
            folder = place.parent.parent
        else:
            folder = place.parent
        name = folder.name
    return Origin(folder.parent.name, name, None, step_in(place.name))


def run_around(place: Path) -> Path | None:
    """The run folder that an absolute path names, or that it lies in as a checkpoint or export."""
    candidates = [place, *place.parents[:4]]
    # RUN@1000 is no folder in RUN.
    by_step = STEP.fullmatch(str(place))
    if by_step is not None:
        candidates.insert(1, Path(by_step["run"]))
    for run in candidates:
        if not is_run(run):
            continue
        inner: tuple[str, ...] = ()
        if place.is_relative_to(run):
            inner = place.relative_to(run).parts
        # Other folders that lie in a run have models of their own.
        if not inner or inner[0] in INSIDE or step_in(inner[0]) is not None:
            return run
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    if (folder / "checkpoints").is_dir():
        return True
    config = folder / CONFIG
    return config.is_file() and run_folder_of(config) == folder


def step_in(name: str) -> int | None:
    """The step in the name of a folder or revision; None if it names none."""
    named = STEP_FOLDER.fullmatch(name.rpartition("@")[2])
    if named is not None:
        return int(named[1])
    by_step = STEP.fullmatch(f"x/{name}")
    if by_step is None:
        return None
    return int(re.findall(r"\d+", name)[-1])


def size_in(name: str) -> str | None:
    """The size that the name of a model says, such as `70m`, in lower case."""
    sizes = SIZE.findall(name)
    if sizes:
        return sizes[0].lower()
    return None


def facts_of_run(run: Path) -> dict[str, int]:
    """Seed of the start weights, last step and tokens of a step, as far as the run's config says
    them."""
    config = config_of_run(run)
    train = config.get("train") or {}
    rows = train.get("batch_size")
    length = (config.get("data") or {}).get("seq_length")
    facts = {
        "seed": start_seed_in(config),
        "last_step": train.get("steps"),
        "tokens_per_step": rows * length if rows and length else None,
    }
    return {name: value for name, value in facts.items() if isinstance(value, int)}


def start_seed_in(config: Mapping[str, Any]) -> int | None:
    """The seed of the start weights in the values of a run's config, as `RunConfig.start_seed`."""
    seed = config.get("weight_seed")
    if seed is None:
        return config.get("seed")
    return seed


def config_of_run(run: Path) -> dict[str, Any]:
    """The config of a run, as its newest checkpoint has it where the folder has none; {} without
    one that can be read."""
    steps = complete_steps(run / "checkpoints")
    places = [run, *(run / "checkpoints" / step_name(step) for step in steps[-1:])]
    for place in places:
        if (place / CONFIG).is_file():
            try:
                return read_yaml(place / CONFIG)
            except CastaliaError:  # numbers are of use without it
                return {}
    return {}


def arithmetic(engine: Engine) -> str:
    """The dtype of the weights, and that of scoring and of the cache where they differ."""
    words = [engine.numbers]
    if isinstance(engine, NativeEngine):
        if engine.scoring != engine.numbers:
            words.append(f"scored in {engine.scoring}")
        if engine.compiled is not None and engine.compiled.cache != engine.caches[0]:
            words.append(f"cache in {engine.compiled.cache}")
    return ", ".join(words)


class Arithmetic(NamedTuple):
    """Options of `castalia.load` that decide how a checkpoint is computed, or whether it is."""

    engine: str = "auto"
    dtype: str | None = None
    cache: str | None = None
    device: str = "auto"
    verify: bool = True
    """Whether a damaged file is an error."""


USUAL = Arithmetic()
REFERENCE = Arithmetic("torch", "fp32")
"""What every other arithmetic is compared with."""


def ahead(path: str, how: Arithmetic) -> tuple[str, str | None]:
    """Engine and dtype that a checkpoint will be labelled with, before it is loaded.

    The dtype is None for an export, whose engine decides it on each machine. An engine that
    engine=auto turns out not to have is another one; such a checkpoint is evaluated again.
    """
    export = None
    if not is_hub_id(path):
        export = open_export(Path(path), check=False)
    if export is not None and not is_read_as_model(export, how.engine):
        engine = engine_of_export(export.kind)
        name = how.engine
        if engine is not None:
            name = engine.name
        return name, None
    engine = engine_for(how.engine, how.dtype)
    words = [how.dtype or engine.dtypes[0]]
    if how.cache not in (None, *engine.caches[:1]):
        words.append(f"cache in {how.cache}")
    return engine.name, ", ".join(words)


def is_computed_so(labelled: str | None, wanted: str) -> bool:
    """Whether a label of a dtype is what `ahead` says; dtype=auto scores in what is fast here."""
    if not wanted.startswith("auto"):
        return labelled == wanted
    return re.sub(r"^int8(, scored in \w+)?", "auto", labelled or "") == wanted


def pinned(path: str | os.PathLike[str], origin: Origin, step: int | None) -> str:
    """The path that names this one checkpoint also when its run has newer ones."""
    place = os.path.abspath(folder_of(os.fspath(path)))
    if origin.run is None or step is None:
        return os.fspath(path)
    if Path(place).is_relative_to(origin.run / "exports"):
        return os.fspath(path)
    return os.path.join(shown(origin.run), f"step{step}")


def shown(place: Path) -> str:
    """A path below this directory as relative to it, any other as it is."""
    here = Path.cwd()
    if place.is_relative_to(here):
        return str(place.relative_to(here))
    return str(place)
