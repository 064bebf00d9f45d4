"""From what a user names (a preset, files, overrides) to one `RunConfig`."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.config.base import check, report
from castalia.config.fields import leaves
from castalia.config.neox import is_neox, override_hint, read_neox
from castalia.config.neox_reading import Reading
from castalia.config.problems import Problem
from castalia.config.values import apply_overrides, flatten, is_override, merge, read_yaml
from castalia.core.errors import ConfigError, nearest
from castalia.core.ranks import world_size
from castalia.recipes.presets import PRESETS, preset, preset_names
from castalia.recipes.pythia import BATCH as PYTHIA_BATCH
from castalia.recipes.pythia import known_mistakes, same_shape
from castalia.train.config import RunConfig


@dataclass(frozen=True)
class Resolved:
    """A config and how it came about."""

    config: RunConfig
    """The resolved config."""
    recipe: str
    """What it started from: the name of a preset or of files."""
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Dotted key -> (the recipe's value, the value now), where overrides and files changed the recipe."""
    notes: list[str] = field(default_factory=list)
    """What was decided on the user's behalf, one sentence each."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """GPT-NeoX options without effect here, by the reason."""

    @property
    def start_notes(self) -> list[str]:
        """The notes and the options without effect, for the start table."""
        return [*self.notes, *(f"without effect here: {line}" for line in self.ignored_lines)]

    @property
    def ignored_lines(self) -> list[str]:
        """One line a reason: `bucket_size, zero.{a, b}: why they have no effect here`."""
        return [f"{', '.join(folded(names))}: {reason}" for reason, names in self.ignored.items()]


@dataclass
class Sources:
    """Sources by kind, in the order given."""

    presets: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


OUR_NAMES = {key.split(".")[-1] for key in leaves(RunConfig)}


def load_config(sources: Iterable[str]) -> RunConfig:
    """The config that `sources` give: see `resolve`."""
    return resolve(sources).config


def resolve(sources: Iterable[str], world: int | None = None) -> Resolved:
    """Read presets, YAML files (ours or GPT-NeoX's) and `a.b=c` overrides; later kinds win, in this order.

    A file of ours may name its base with `recipe: pythia-70m`. The suffix .yml or .yaml may be left out. `world`
    is the number of processes, for GPT-NeoX files that name no train_batch_size; None takes the environment's.
    Raises  ConfigError with every problem at once.
    """
    found = sort_sources(list(sources))
    if found.problems:
        raise ConfigError("; ".join(found.problems))
    own, neox = read_files(found.files)
    name = found.presets[0] if found.presets else own.get("recipe")
    reading = (
        read_neox(neox, world=world or world_size(), complete=name is None) if neox else Reading()
    )
    base = preset(name) if name is not None else {"output": f"runs/{found.files[0].stem}"}
    files = merge(merge(base, reading.values), own)
    values, notes = fit_micro_batch(files, found.overrides)
    label = " + ".join(([] if name is None else [name]) + [path.name for path in found.files])
    config = checked(apply_overrides(values, found.overrides), reading, found.overrides, label)
    notes += [item.text for item in reading.notes if not settled(item.key, found.overrides)]
    started = files if name is None else base
    changes = differences(started, config)
    return Resolved(
        config, name or label, changes, notes + remarks(config, neox, changes), reading.ignored
    )


def read_files(paths: list[Path]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Our files' values, the later laid on the earlier, and GPT-NeoX's files by name."""
    own: dict[str, Any] = {}
    neox: dict[str, dict[str, Any]] = {}
    problems = []
    for path in paths:
        try:
            values = read_yaml(path)
        except ConfigError as error:
            hint = f"; the preset {path.stem!r} has its values" if path.stem in PRESETS else ""
            problems.append(f"{error}{hint}")
            continue
        if is_neox(values):
            neox[str(path)] = values
        else:
            own = merge(own, values)
    if problems:
        raise ConfigError("; ".join(problems))
    return own, neox


def settled(key: str, overrides: list[str]) -> bool:
    """Whether an override sets the dotted key that a remark is about."""
    return bool(key) and key in {text.partition("=")[0] for text in overrides}


def checked(
    values: dict[str, Any], reading: Reading, overrides: list[str], label: str
) -> RunConfig:
    """The config, or one error with the problems of the GPT-NeoX files, the values and the overrides."""
    config, problems = check(RunConfig, values)
    lines = [item.text for item in reading.problems if not settled(item.key, overrides)]
    settled_keys = {item.key for item in reading.problems}
    for problem in problems:
        given = {problem.key, problem.key.split(".")[0], problem.key.split(".")[-1]}
        if problem.missing and (given & settled_keys or given & reading.origins.keys()):
            continue
        lines.append(explain(problem, reading))
    if config is None or lines:
        raise ConfigError("\n".join([report(lines, label), *known_mistakes(values.get("model"))]))
    return config


def explain(problem: Problem, reading: Reading) -> str:
    """A problem's line, with the place in the GPT-NeoX file that it comes from, or our name for a GPT-NeoX option."""
    if problem.unknown and problem.key not in OUR_NAMES and (hint := override_hint(problem.key)):
        return hint
    origin = reading.origins.get(problem.key)
    return f"{problem.text} ({origin})" if origin else problem.text


def remarks(config: RunConfig, neox: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    """Notes on the config as a whole."""
    out = []
    twin = same_shape(config.model)
    if (
        neox
        and twin
        and config.train.batch_size != PYTHIA_BATCH
        and "train.batch_size" not in changes
    ):
        out.append(
            f"the model has the shape of {twin}, whose published run took {PYTHIA_BATCH} rows a step:"
            f" train.batch_size={PYTHIA_BATCH}"
        )
    horizon = config.schedule.decay_steps
    if horizon and horizon > config.train.steps:
        out.append(
            f"schedule.decay_steps {horizon} goes beyond train.steps {config.train.steps}: the run is the beginning of"
            " a longer one; schedule.decay_steps=null ends the schedule with the run"
        )
    return out


def sort_sources(sources: list[str]) -> Sources:
    """Tell presets, files and overrides apart; collects what is none of them."""
    out = Sources()
    for source in sources:
        path = find_file(source)
        if is_override(source):
            out.overrides.append(source)
        elif source in PRESETS:
            out.presets.append(source)
        elif path is not None:
            out.files.append(path)
        else:
            out.problems.append(unknown_source(source))
    if len(out.presets) > 1:
        out.problems.append(
            f"one preset makes a config, got {len(out.presets)}: {', '.join(out.presets)}"
        )
    if not out.presets and not out.files and not out.problems:
        out.problems.append(
            f"name a preset or a YAML file first; presets: {', '.join(preset_names())}"
        )
    return out


def find_file(source: str) -> Path | None:
    """The file that `source` names, with or without its suffix .yml or .yaml."""
    # os.path, for a long list of words is no file name, and Path.is_file says so with an OSError
    return next(
        (Path(source + end) for end in ("", ".yml", ".yaml") if os.path.isfile(source + end)), None
    )


def unknown_source(source: str) -> str:
    """Why `source` cannot be used, with the nearest preset and the list of them."""
    path = Path(source)
    if os.path.isdir(source):
        return (
            f"{source} is a folder; name the config file in it, for instance {path / 'config.yaml'}"
        )
    if path.suffix in (".yml", ".yaml", ".json") or "/" in source:
        hint = f"; the preset {path.stem!r} exists" if path.stem in PRESETS else ""
        return f"no config file {source}{hint}"
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", source):
        return f"{source} alone says nothing; write {source}=VALUE to override it"
    hint = nearest(source, PRESETS) or "."
    return f"no preset or config file {source!r}{hint} Presets: {', '.join(preset_names())}"


def fit_micro_batch(
    values: dict[str, Any], overrides: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Shrink a micro-batch that only the recipe chose when an override of the batch no longer divides by it."""
    asked = {text.partition("=")[0] for text in overrides}
    train = values.get("train")
    micro = train.get("micro_batch_size") if isinstance(train, dict) else None
    if (
        "train.batch_size" not in asked
        or "train.micro_batch_size" in asked
        or not isinstance(micro, int)
    ):
        return values, []
    rows = apply_overrides(values, overrides)["train"]["batch_size"]
    if not isinstance(rows, int) or rows < 1 or rows % micro == 0:
        return values, []
    fit = math.gcd(rows, micro)
    note = f"train.micro_batch_size is {fit}: the recipe's {micro} does not divide train.batch_size {rows}"
    return merge(values, {"train": {"micro_batch_size": fit}}), [note]


def differences(started: dict[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose value is no longer that of the recipe."""
    recipe, _ = check(RunConfig, started)
    before = flatten(recipe.model_dump(mode="json")) if recipe else flatten(started)
    now = flatten(config.model_dump(mode="json"))
    return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


def folded(names: list[str]) -> list[str]:
    """`a.x`, `a.y` as `a.{x, y}`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group, _, last = name.rpartition(".")
        groups.setdefault(group, []).append(last)
    return [
        f"{group}.{{{', '.join(lasts)}}}"
        if group and len(lasts) > 1
        else ", ".join(f"{group}.{x}" if group else x for x in lasts)
        for group, lasts in groups.items()
    ]
