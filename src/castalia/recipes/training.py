"""`train`: the verb `castalia train` for Python."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from castalia.config.fields import leaves
from castalia.core.errors import ConfigError, nearest
from castalia.recipes.load import resolve
from castalia.runs.config import RunConfig

if TYPE_CHECKING:
    from castalia.train.hooks import Hook
    from castalia.train.trainer import Trainer


def train(
    *words: "str | os.PathLike[str] | RunConfig", hooks: "Sequence[Hook]" = (), **settings: Any
) -> "Trainer":
    """Train a model, or resume its run; returns the Trainer, which stands for the run's folder.

    words     those of `castalia train`: a preset, YAML files, a run's folder, overrides `a.b=c`; or
              one RunConfig, for instance of `load_config`
    settings  overrides by name: a section (`optim={"lr": 1e-3}`), a key that has its name to
              itself (`lr=1e-3`, `batch_size=8`) or stands in the section `train` (`steps=20`), or
              a dotted key (`**{"checkpoint.every": 100}`)
    hooks     run after those of the config

    Raises  ConfigError, DataError or CheckpointError before the first step; TrainingError when the
            run's guard stops it.

    Examples
        >>> import castalia
        >>> run = castalia.train("debug", steps=4, output="runs/first")
        >>> run.progress.step
        4
        >>> castalia.train("debug", "optim.lr=1e-3", log_every=1, steps=4, output="runs/longer")
        Trainer('runs/longer', step 4 of 4, 891,648 parameters)
        >>> run = castalia.train("runs/longer", steps=6)  # resumes
    """
    # The loop imports torch, which reading a config does without.
    from castalia.train.run import Announced, run

    configs = [word for word in words if isinstance(word, RunConfig)]
    if configs:
        if len(words) > 1 or settings:
            raise ConfigError(
                "a RunConfig is whole: pass it alone, or the words that it was made of together"
                " with the overrides"
            )
        (config,) = configs
        return run(config, ["castalia", "train", config.output], hooks=hooks)
    texts = [os.fspath(word) for word in words if not isinstance(word, RunConfig)]
    texts += override_words(settings)
    resolved = resolve(texts)
    return run(
        resolved.config,
        ["castalia", "train", *texts],
        hooks=hooks,
        announced=Announced(resolved.changes, resolved.start_notes),
    )


def override_words(settings: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as overrides `a.b=c`.

    Raises  ConfigError with every name that means no key, or several.
    """
    words = []
    problems = []
    for name, value in settings.items():
        try:
            key = key_named(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if isinstance(value, Mapping):
            words += [f"{key}.{inner}={as_yaml(item)}" for inner, item in value.items()]
        else:
            words.append(f"{key}={as_yaml(value)}")
    if problems:
        raise ConfigError("; ".join(problems))
    return words


def key_named(name: str) -> str:
    """The dotted key that a keyword argument means.

    Raises  ConfigError for a name that is no key, or that several sections have.
    """
    if "." in name or name in RunConfig.model_fields:
        return name
    keys = [key for key in leaves(RunConfig) if key.split(".")[-1] == name]
    # Numbers of the loop come first: `steps` is the run's, and not the list of checkpoints.
    loop = [key for key in keys if key == f"train.{name}"]
    chosen = loop or keys
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        names = [key.split(".")[-1] for key in leaves(RunConfig)]
        raise ConfigError(f"{name}: unknown setting{nearest(name, names)}")
    choice = " or ".join(f"**{{{key!r}: ...}}" for key in chosen)
    raise ConfigError(f"{name}: several sections have this key; write {choice}")


def as_yaml(value: Any) -> str:
    """The value as an override writes it; JSON is YAML."""
    return json.dumps(value, default=plain)


def plain(value: Any) -> Any:
    """What JSON does not know: paths, and numpy's numbers and arrays."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ConfigError(f"a config holds numbers, text, lists and mappings, got {value!r}")
