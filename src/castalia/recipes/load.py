"""From what a user names (a preset, files, overrides) to one `RunConfig`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.config.base import check, report
from castalia.config.sources import apply_overrides, flatten, is_override, merge, read_yaml
from castalia.core.errors import ConfigError, nearest
from castalia.recipes.presets import PRESETS, preset, preset_names
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


@dataclass
class Sources:
    """Sources by kind, in the order given."""

    presets: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_config(sources: Iterable[str]) -> RunConfig:
    """The config that `sources` give: see `resolve`."""
    return resolve(sources).config


def resolve(sources: Iterable[str]) -> Resolved:
    """Read presets, YAML files (ours or GPT-NeoX's) and `a.b=c` overrides; later kinds win, in this order.

    A file of ours may name its base with `recipe: pythia-70m`. The suffix .yml or .yaml may be left out.
    Raises  ConfigError with every problem at once.
    """
    found = sort_sources(list(sources))
    if found.problems:
        raise ConfigError("; ".join(found.problems))
    values: dict[str, Any] = {}
    for path in found.files:
        values = merge(values, read_yaml(path))
    name = found.presets[0] if found.presets else values.get("recipe")
    base = preset(name) if name is not None else {"output": f"runs/{found.files[0].stem}"}
    started = base if name is not None else merge(base, values)
    values, notes = fit_micro_batch(merge(base, values), found.overrides)
    label = name or " + ".join(str(path) for path in found.files)
    config, problems = check(RunConfig, apply_overrides(values, found.overrides))
    if config is None:
        raise ConfigError(report([problem.text for problem in problems], label))
    return Resolved(config, label, differences(started, config), notes)


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
        out.problems.append(f"one preset makes a config, got {len(out.presets)}: {', '.join(out.presets)}")
    if not out.presets and not out.files and not out.problems:
        out.problems.append(f"name a preset or a YAML file first; presets: {', '.join(preset_names())}")
    return out


def find_file(source: str) -> Path | None:
    """The file that `source` names, with or without its suffix .yml or .yaml."""
    return next((path for end in ("", ".yml", ".yaml") if (path := Path(source + end)).is_file()), None)


def unknown_source(source: str) -> str:
    """Why `source` cannot be used, with the nearest preset and the list of them."""
    path = Path(source)
    if path.is_dir():
        return f"{source} is a folder; name the config file in it, for instance {path / 'config.yaml'}"
    if path.suffix in (".yml", ".yaml", ".json") or "/" in source:
        hint = f"; the preset {path.stem!r} exists" if path.stem in PRESETS else ""
        return f"no config file {source}{hint}"
    return f"no preset or config file {source!r}{nearest(source, PRESETS)} Presets: {', '.join(preset_names())}"


def fit_micro_batch(values: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Shrink a micro-batch that only the recipe chose when an override of the batch no longer divides by it."""
    asked = {text.partition("=")[0] for text in overrides}
    train = values.get("train")
    micro = train.get("micro_batch_size") if isinstance(train, dict) else None
    if "train.batch_size" not in asked or "train.micro_batch_size" in asked or not isinstance(micro, int):
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
