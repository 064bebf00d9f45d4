"""The file of a suite: sizes, data variants, seeds, checkpoints and what all members share."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from castalia.config.base import Config, build
from castalia.config.values import read_yaml
from castalia.core.errors import ConfigError, nearest
from castalia.suites.builtin import BUILTIN

SUITE_FILE = "suite.yaml"
"""Copy of the suite's file in its folder."""
STANDARD = "standard"
"""The data variant that has no place in a member's name."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")


class SeedPair(Config):
    """A seed of the data order and one of the start weights."""

    data_seed: NonNegativeInt | None = None
    """Seed of the data order; null is that of the base."""
    weight_seed: NonNegativeInt | None = None
    """Seed of the start weights; null is that of the base."""

    @model_validator(mode="after")
    def check(self) -> "SeedPair":
        """One of them is given."""
        if self.data_seed is None and self.weight_seed is None:
            raise ValueError("give data_seed, weight_seed or both")
        return self


class Grid(Config):
    """Steps at which every member is saved, besides its last one."""

    steps: list[NonNegativeInt] = []
    """Single steps."""
    every: PositiveInt | None = None
    """Every multiple of this number of steps."""


class SuiteConfig(Config):
    """Sizes x data variants x seeds, each a run of its own on the same stream."""

    name: str = Field(min_length=1)
    """Name of the suite, also of its folder."""
    output: str | None = None
    """Folder of the suite; null is runs/NAME. Members are folders in it."""
    base: str | list[str] = []
    """What all members start from, as words of `castalia train`: a preset, files, overrides. Empty
    means that each size names a preset, which gives the whole config."""
    sizes: dict[str, str | dict[str, Any]] = Field(min_length=1)
    """Name -> a preset, of any family, or overrides of the base, nested or dotted. A mapping may
    have both, the preset as `preset`. With a base, only the model of a preset is taken."""
    data: dict[str, dict[str, Any]] = Field({STANDARD: {}}, min_length=1)
    """Name -> overrides. `preset: "{preset}-deduped"` puts another preset in place of the size's.
    The variant `standard` is left out of the names of members."""
    seeds: list[NonNegativeInt | SeedPair] = Field([0], min_length=1)
    """An integer seeds both the data order and the start weights; {data_seed: 1} and
    {weight_seed: 1} one of them."""
    extra_seeds: list[NonNegativeInt | SeedPair] = []
    """Further seeds, whose members exist only where they are asked for by name."""
    unnamed_seed: NonNegativeInt | None = None
    """The seed that is left out of the names of members."""
    checkpoints: Literal["pythia"] | list[NonNegativeInt] | Grid | None = "pythia"
    """Steps to save: pythia has 0, 1, 2, 4, ..., 512 and every 1000, 154 of 143,000 steps; null
    leaves the base's own."""
    set: dict[str, Any] = {}
    """Overrides of every member, nested or dotted."""
    same_batches: bool = True
    """Require that the members of a data variant and a data seed read equal batches."""

    @field_validator("sizes", "data")
    @classmethod
    def check_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        """Names become parts of folders, and dashes join the parts."""
        for name in named:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r}: a name consists of letters, digits, dots and _")
        return named

    @property
    def base_words(self) -> list[str]:
        """The words of the base."""
        if isinstance(self.base, str):
            return [self.base]
        return self.base

    @property
    def folder(self) -> Path:
        """The folder of the suite."""
        return Path(self.output or f"runs/{self.name}")


def read_suite(word: str) -> SuiteConfig:
    """The suite of a name such as `mini`, of a YAML file, or of the folder of one.

    Raises  ConfigError with the known names, or with every problem of the file.
    """
    path = Path(word)
    if (path / SUITE_FILE).is_file():
        # The folder may have been moved since the file was written.
        return suite_of(read_yaml(path / SUITE_FILE) | {"output": word.rstrip("/")}, word)
    if path.is_file():
        return suite_of({"name": path.stem} | read_yaml(path), word)
    if word in BUILTIN:
        return suite_of(BUILTIN[word], word)
    if path.is_dir():
        raise ConfigError(
            f"{word} is no folder of a suite: it has no {SUITE_FILE}; castalia suite FILE --run"
            " makes one"
        )
    raise ConfigError(
        f"unknown suite {word!r}: no such file or folder, and the known suites are"
        f" {', '.join(BUILTIN)}{nearest(word, BUILTIN)}; castalia suite mini --run output={word}"
        " makes a folder of one, and a YAML file with `sizes:` describes one of your own"
    )


def suite_of(values: dict[str, Any], where: str) -> SuiteConfig:
    """The suite of these values.

    Raises  ConfigError with every problem.
    """
    return build(SuiteConfig, values, where)
