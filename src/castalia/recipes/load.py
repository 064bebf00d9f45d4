"""From the words of a user (a preset, files, overrides) to one `RunConfig`."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.config.anchor import anchored, run_folder_of
from castalia.config.base import check, report
from castalia.config.fields import leaves
from castalia.config.foreign import ABSENT, OURS
from castalia.config.neox import is_neox, override_hint, read_neox
from castalia.config.neox_reading import NeoxReading
from castalia.config.problems import CHOOSERS, Problem
from castalia.config.values import Layers, Values, flatten, merge, parse_override, read_yaml
from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.files import several
from castalia.core.ranks import world_size
from castalia.recipes.optimizer import fit_optimizer
from castalia.recipes.presets import PRESETS, preset
from castalia.recipes.pythia import BATCH as PYTHIA_BATCH
from castalia.recipes.pythia import known_mistakes, same_shape
from castalia.recipes.start import take_start
from castalia.recipes.words import sort_words
from castalia.runs.config import RunConfig
from castalia.runs.whole_passes import with_steps
from castalia.tokenizers.tokenizer import load_tokenizer

BYTES_PER_TOKEN = 4
"""Bytes of a text file for each token, about: what a common tokenizer makes of English."""


@dataclass(frozen=True)
class Resolved:
    """A config and where it came from."""

    config: RunConfig
    recipe: str
    """Name of the preset, else of the files."""
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Dotted key -> (the recipe's value, the value now), where files and overrides changed it."""
    notes: list[str] = field(default_factory=list)
    """Decisions taken on the user's behalf, one sentence each."""
    launch_notes: list[str] = field(default_factory=list)
    """Those about starting the ranks, which do not matter where the ranks run already."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """GPT-NeoX options without effect here, by reason."""

    @property
    def start_notes(self) -> list[str]:
        """The notes and the options without effect, for the start table."""
        return [*self.notes, *(f"without effect here: {line}" for line in self.ignored_lines)]

    @property
    def ignored_lines(self) -> list[str]:
        """One line a reason: `bucket_size, zero.{a, b}: why they have no effect here`."""
        return [f"{', '.join(folded(names))}: {reason}" for reason, names in self.ignored.items()]


OUR_NAMES = {key.split(".")[-1] for key in leaves(RunConfig)}


def load_config(
    words: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> RunConfig:
    """The config that `words` give, those of `castalia show` and `train`: see `resolve`.

    A single word may stand alone, `load_config("debug")`.
    Raises  ConfigError with every problem at once.

    Examples
        >>> from castalia.recipes import load_config
        >>> config = load_config(["debug", "train.steps=20", "optim.lr=1e-3"])
        >>> config.train.steps, config.optim.lr
        (20, 0.001)
    """
    return resolve([os.fspath(word) for word in several(words)]).config


def resolve(words: Sequence[str], world: int | None = None) -> Resolved:
    """Read a preset, YAML files (ours or GPT-NeoX's) and `a.b=c` overrides, in this precedence.

    A run's folder stands for the config.yaml in it, and the suffix .yml or .yaml may be left out.
    The config of a run folder means that folder, from any working directory.
    A file of ours may name its base with `recipe: pythia-70m`. `world` is the world size, for
    GPT-NeoX files without train_batch_size; None takes the environment's.
    Raises  ConfigError with every problem at once.
    """
    named = sort_words(words)
    own, neox = read_files(named.files)
    name = own.get("recipe")
    if named.presets:
        name = named.presets[0]
    reading = NeoxReading()
    if neox:
        reading = read_neox(neox, world=world or world_size(), complete=name is None)
    layers = Layers(
        files=merge(reading.values, in_place(own)),
        overrides=[in_place(parse_override(text)) for text in named.overrides],
    )
    labels = [path.name for path in named.files]
    if name is None:
        # Files without a preset are the recipe: differences count from them.
        layers.base = {"output": f"runs/{named.files[0].stem}"}
        start_notes = take_start(layers, None)
        started = merge(layers.base, layers.files)
    else:
        layers.base = preset(str(name))
        labels.insert(0, str(name))
        start_notes = take_start(layers, str(name))
        started = layers.base
    notes = [
        *named.notes,
        *start_notes,
        *fit_micro_batch(layers),
        *fit_vocabulary(layers),
        *fit_optimizer(layers),
        *fit_epochs(layers),
    ]
    label = " + ".join(labels)
    config, counted = count_steps(checked(layers, reading, label))
    notes += counted
    changes = differences(started, config)
    remaining = [note for note in reading.notes if not layers.overrides_key(note.key)]
    notes += [note.text for note in remaining if not note.key.startswith("launch.")]
    launch_notes = [note.text for note in remaining if note.key.startswith("launch.")]
    notes += remarks(config, neox, changes)
    return Resolved(config, str(name or label), changes, notes, launch_notes, reading.ignored)


def in_place(values: Values) -> Values:
    """The values with `mup` at the top, which is short for `model.mup`, where it belongs."""
    if "mup" not in values:
        return values
    rest = {name: value for name, value in values.items() if name != "mup"}
    return merge(rest, {"model": {"mup": values["mup"]}})


def read_files(paths: list[Path]) -> tuple[Values, dict[str, Values]]:
    """Values of our files, the later laid over the earlier, and GPT-NeoX's files by name.

    Raises  ConfigError naming every file that cannot be read.
    """
    own: Values = {}
    neox: dict[str, Values] = {}
    problems = []
    for path in paths:
        try:
            values = read_yaml(path)
        except ConfigError as error:
            hint = ""
            if path.stem in PRESETS:  # one of Pythia's published files lacks a comma
                hint = f"; the preset {path.stem!r} has its values"
            problems.append(f"{error}{hint}")
            continue
        folder = run_folder_of(path)
        if is_neox(values):
            neox[str(path)] = values
        elif folder is not None:
            own = merge(own, anchored(values, folder))
        else:
            own = merge(own, values)
    if problems:
        raise ConfigError("; ".join(problems))
    return own, neox


def checked(layers: Layers, reading: NeoxReading, label: str) -> RunConfig:
    """The config, or one error with the problems of the GPT-NeoX files and of the values."""
    values = layers.resolved()
    config, problems = check(RunConfig, values)
    lines = [item.text for item in reading.problems if not layers.overrides_key(item.key)]
    reported = {item.key for item in reading.problems} | reading.origins.keys()
    for problem in problems:
        # A wrong value of a GPT-NeoX file is missing here; it was reported in the file's words.
        names = {problem.key, problem.key.split(".")[0], problem.key.split(".")[-1]}
        if not problem.missing or not names & reported:
            lines.append(explain(problem, reading))
    if config is None or lines:
        raise ConfigError("\n".join([report(lines, label), *known_mistakes(values.get("model"))]))
    return config


def explain(problem: Problem, reading: NeoxReading) -> str:
    """A problem's line, with its place in a GPT-NeoX file or our name for a GPT-NeoX option."""
    name = problem.key.split(".")[-1]
    if problem.unknown and name not in OUR_NAMES | ABSENT.keys() | OURS.keys() | set(CHOOSERS):
        hint = override_hint(name)
        if hint is not None:
            return problem.key.removesuffix(name) + hint
    origin = reading.origins.get(problem.key)
    if origin is None:
        return problem.text
    return f"{problem.text} ({origin})"


def remarks(config: RunConfig, neox: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Notes on the config as a whole."""
    notes = []
    twin = same_shape(config.model)
    # Pythia's files name their batch in a comment only, which no reader of YAML sees.
    guessed = neox and "train.batch_size" not in changes
    if twin and guessed and config.train.batch_size != PYTHIA_BATCH:
        notes.append(
            f"the model has the shape of {twin}, whose published run had {PYTHIA_BATCH} rows a"
            f" step: train.batch_size={PYTHIA_BATCH}"
        )
    if twin == "pythia-1b" and neox and config.precision == "fp16":
        notes.append(
            "the published file of pythia-1b says fp16, but the released model was trained in bf16,"
            " as the preset is (pythia-1b-deduped in fp16): precision=bf16"
        )
    numerics = getattr(config.model, "rope_numerics", None)
    if twin and neox and config.precision == "fp16" and numerics == "fp32":
        notes.append(
            f"GPT-NeoX v1.0, which trained {twin}, rounded the rotary tables to fp16, as the preset"
            " does, and later versions do not: model.rope_numerics=neox_v1_fp16"
        )
    horizon = config.schedule.decay_steps
    if horizon and horizon > config.train.steps:
        notes.append(
            f"schedule.decay_steps {horizon} goes beyond train.steps {config.train.steps}: the run"
            " is the beginning of a longer one; schedule.decay_steps=null ends the schedule with"
            " the run"
        )
    return notes


def fit_micro_batch(layers: Layers) -> list[str]:
    """Shrink the recipe's micro-batch if it no longer divides an overridden batch; says so."""
    if not layers.overrides_key("train.batch_size") or layers.overrides_key(
        "train.micro_batch_size"
    ):
        return []
    values = flatten(layers.resolved())
    rows = values.get("train.batch_size")
    micro = values.get("train.micro_batch_size")
    # Wrong values are left to the check of the config, which has the better words for them.
    if not isinstance(micro, int) or not isinstance(rows, int) or min(rows, micro) < 1:
        return []
    if rows % micro == 0:
        return []
    fit = math.gcd(rows, micro)
    layers.fitted = merge(layers.fitted, {"train": {"micro_batch_size": fit}})
    return [
        f"train.micro_batch_size is {fit}: train.batch_size {rows} is not divisible by the"
        f" recipe's {micro}"
    ]


def fit_vocabulary(layers: Layers) -> list[str]:
    """Widen the recipe's vocabulary to hold the ids of an overridden tokenizer; says so.

    A larger vocabulary than the tokenizer's stays: it costs rows that are never read, and published
    models have one.
    """
    if not layers.overrides_key("data.tokenizer"):
        return []
    if layers.overrides_key("model.vocab_size") or "model.vocab_size" in flatten(layers.files):
        return []
    values = flatten(layers.resolved())
    name = values.get("data.tokenizer")
    recipes_ids = values.get("model.vocab_size")
    # A tokenizer of the hub is not fetched for a hint; the run checks the ids of its data.
    if not isinstance(recipes_ids, int) or not isinstance(name, str) or not Path(name).exists():
        return []
    try:
        ids = load_tokenizer(name).vocab_size
    except CastaliaError:
        # The run refuses it, with the reason.
        return []
    if ids <= recipes_ids:
        return []
    layers.fitted = merge(layers.fitted, {"model": {"vocab_size": ids}})
    return [f"model.vocab_size is {ids}, the ids of {name}: the recipe's {recipes_ids} are fewer"]


def fit_epochs(layers: Layers) -> list[str]:
    """Drop the recipe's train.epochs if an override gives the steps; says so.

    Raises  ConfigError if overrides give both.
    """
    steps, epochs = (layers.overrides_key(f"train.{name}") for name in ("steps", "epochs"))
    given = flatten(layers.resolved()).get("train.epochs")
    if given is None or not steps:
        return []
    if epochs:
        raise ConfigError(
            f"train.epochs={given} and train.steps are two lengths of one run; give one of them"
        )
    layers.fitted = merge(layers.fitted, {"train": {"epochs": None}})
    return [f"train.epochs={given} of the recipe gives way to train.steps"]


def count_steps(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with the steps of train.epochs, and a note about them."""
    epochs = config.train.epochs
    if epochs is None:
        return config, []
    built = [name for name in ("corpus", *config.data.texts) if getattr(config.data, name)]
    if built and not config.data.train_prefixes:
        note = (
            f"train.epochs={epochs} sets train.steps at the start of the run, which makes the token"
            f" files of data.{built[0]}"
        )
        config, about = guess_steps(config)
        return config, [note + about]
    try:
        config = with_steps(config)
    except CastaliaError as error:
        return config, [f"train.epochs={epochs} sets train.steps where the data are: {error}"]
    return config, [
        f"train.steps is {config.train.steps}: the batches of {config.train.batch_size} rows in"
        f" train.epochs={epochs} passes over data.train"
    ]


def guess_steps(config: RunConfig) -> tuple[RunConfig, str]:
    """The config with the steps that the size of its text files lets expect, and words about them;
    without such files as it is."""
    paths = [Path(path) for name in config.data.texts for path in getattr(config.data, name)]
    sizes = [path.stat().st_size for path in paths if path.is_file()]
    if not sizes or config.train.epochs is None:
        return config, ""
    rows = sum(sizes) / BYTES_PER_TOKEN / config.data.seq_length
    steps = max(1, math.ceil(config.train.epochs * rows / config.train.batch_size))
    train = config.train.model_copy(update={"steps": steps})
    return config.model_copy(update={"train": train}), f"; by their size about {steps}"


def differences(started: Values, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose value is not that of the recipe's values `started`."""
    recipe, _ = check(RunConfig, started)
    before = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(started).items()}
    if recipe is not None:
        before = flatten(recipe.model_dump(mode="json"))
    # A recipe that is no config before a start or data are named has no defaults to compare with:
    # then what nobody has set does not count.
    now = flatten(config.model_dump(mode="json", exclude_unset=recipe is None))
    chosen = flatten(config.model_dump(mode="json", exclude_defaults=True))
    return {
        key: (before.get(key), value)
        for key, value in now.items()
        if before.get(key) != value and not is_implied(key, before, chosen)
    }


def is_implied(key: str, before: Values, chosen: Values) -> bool:
    """Whether `key` is a default of a section that the recipe does not have, and that other keys
    show: a mirror is its URL, not the number of its retries."""
    if key in before or key in chosen:
        return False
    section = key.rpartition(".")[0]
    while section and section not in before:
        section = section.rpartition(".")[0]
    return bool(section) and any(name.startswith(f"{section}.") for name in chosen)


def folded(names: list[str]) -> list[str]:
    """`a.x`, `a.y` as `a.{x, y}`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group, _, last = name.rpartition(".")
        groups.setdefault(group, []).append(last)
    out = []
    for group, lasts in groups.items():
        if group and len(lasts) > 1:
            out.append(f"{group}.{{{', '.join(lasts)}}}")
        else:
            out += [f"{group}.{last}".removeprefix(".") for last in lasts]
    return out
