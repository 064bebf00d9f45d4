"""The words that `castalia show`, `train` and `launch` take: presets, config files, overrides."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from castalia.config.anchor import CONFIG
from castalia.config.fields import field_at
from castalia.config.problems import hint_for
from castalia.config.values import is_override
from castalia.core.errors import ConfigError, nearest
from castalia.core.hub import is_hub_id, local_reading
from castalia.recipes.finetuning import FINE_TUNING
from castalia.recipes.presets import PRESETS, preset_names
from castalia.recipes.pythia import NAMES, VARIANTS
from castalia.runs.config import RunConfig

SUFFIXES = ("", ".yml", ".yaml")
"""A file may be named without its suffix."""


@dataclass
class Words:
    """The words of a command line by kind, each kind in the order given."""

    presets: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a word does not mean, though it could."""


def sort_words(words: Sequence[str]) -> Words:
    """The words by kind.

    Raises  ConfigError naming every word of no kind, a second preset, or the lack of a base.
    """
    if "=" in words:
        raise ConfigError("write an override as one word, a.b=c, without spaces around the =")
    kinds = Words()
    problems = []
    for word in words:
        file = find_file(word)
        if is_override(word):
            kinds.overrides.append(word)
        elif word in PRESETS:
            kinds.presets.append(word)
            if file is not None:
                kinds.notes.append(f"{word} is the preset; ./{word} is the one in this folder")
        elif file is not None:
            kinds.files.append(file)
        else:
            problems.append(unknown_word(word))
    if len(kinds.presets) > 1:
        given = ", ".join(kinds.presets)
        problems.append(f"a config has one preset, got {len(kinds.presets)}: {given}")
    if not kinds.presets and not kinds.files and not problems:
        problems.append(f"name a preset, a YAML file or a run's folder first; {preset_menu()}")
    if problems:
        raise ConfigError("; ".join(problems))
    return kinds


def in_folder(folder: str | None, words: Sequence[str]) -> list[str]:
    """The words, with files of `folder` by their paths; presets, overrides and other files stay.

    A name in the folder goes before a preset and before a file elsewhere.
    Raises  ConfigError if the folder does not exist, or naming every word that is none of these.
    Source  GPT-NeoX's deepy.py, `-d DIR`, which adds `.yml` too where a name lacks it.
    """
    if folder is None:
        return list(words)
    if not os.path.isdir(folder):
        raise ConfigError(f"-d {folder}: no such folder; name the folder of the config files")
    found = []
    missing = []
    for word in words:
        file = None if is_override(word) else find_file(os.path.join(folder, word))
        if file is not None:
            found.append(str(file))
        elif is_override(word) or word in PRESETS or find_file(word) is not None:
            found.append(word)
        else:
            missing.append(word)
    if missing:
        names = sorted(path.stem for path in Path(folder).iterdir())
        near = "".join(nearest(os.path.basename(word), names) for word in missing[:1])
        raise ConfigError(f"no config file {', '.join(missing)} in {folder}{near}")
    return found


def find_file(word: str) -> Path | None:
    """The config file that `word` names: a file with or without its suffix, a run's folder, or the
    folder of its checkpoints.
    """
    names = [word + suffix for suffix in SUFFIXES] + [os.path.join(word, CONFIG)]
    run, inner = os.path.split(word.rstrip("/"))
    if inner == "checkpoints":
        names.append(os.path.join(run, CONFIG))
    # os.path, because Path.is_file raises OSError for a word longer than any file name.
    for name in names:
        if os.path.isfile(name):
            return Path(name)
    return None


def unknown_word(word: str) -> str:
    """Why `word` cannot be used, with the way out."""
    path = Path(word)
    if os.path.isdir(word):
        hint = ""
        if any(path.glob(f"*/{CONFIG}")):
            hint = f"; castalia runs {word} lists the runs in it"
        elif os.path.isfile(os.path.join(word, "config.json")):
            hint = f"; to start from this model, add model.start={word} to a config"
        return f"the folder {word} is not a run: it has no config.yaml{hint}"
    if path.suffix in (".yml", ".yaml", ".json"):
        if path.stem in PRESETS:
            return f"no config file {word}; for the preset write {path.stem}"
        near = local_reading(path)
        hint = f"; did you mean {str(near)!r}?" if near is not None and near.is_file() else ""
        return f"no config file {word}{hint}"
    if "/" in word:
        return f"no run folder or config file {word}{hint_of_model(word)}"
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", word):
        if field_at(RunConfig, word.split(".")) is None:
            return f"{word}: unknown key{hint_for(RunConfig, word.split('.'))}"
        return f"{word!r} needs a value: {word}=VALUE"
    hint = f"; {preset_menu()}"
    # `pythia` is the beginning of all of them: any one would be a guess.
    plain = [name for name in PRESETS if name not in VARIANTS and not name.endswith("-deduped")]
    sizes = [name for name in plain if name.startswith(word)]
    if len(sizes) < 2:
        hint = nearest(word, PRESETS) or hint
    return f"unknown preset or config file {word!r}{hint}"


def hint_of_model(word: str) -> str:
    """What a checkpoint of a run, or a hub id, is for: a config may start from it."""
    run, _, step = word.replace("@", "/").rpartition("/")
    if re.fullmatch(r"(step-?)?\d+", step) and find_file(run) is not None:
        return (
            f": it is a checkpoint; the run is {run}, and a new run from this step is"
            f" {run} model.start={word} output=FOLDER"
        )
    near = local_reading(Path(word))
    if near is not None:
        return f"; did you mean {str(near)!r}?"
    if any(Path(word).parent.glob(f"*/{CONFIG}")):
        return f"; `castalia runs {Path(word).parent}` lists the runs there"
    if is_hub_id(word):
        return f"; a model of the hub is added to a config, as model.start={word}"
    return ""


def preset_menu() -> str:
    """The presets in a line; those for the deduplicated Pile are left to a remark."""
    first = [name for name in ("debug", "demo", "mini", *NAMES) if not name.endswith("-deduped")]
    known = (*first, *NAMES, *VARIANTS, *FINE_TUNING)
    others = [name for name in preset_names() if name not in known]
    return (
        f"presets: {', '.join(first)}; each pythia also with -deduped, most"
        f" with -v0; of other families"
        f" {', '.join(others)}; to fine-tune model.start {', '.join(FINE_TUNING)}"
    )
