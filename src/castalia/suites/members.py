"""The members of a suite: each a run, with the words that `castalia train` gets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from castalia.checkpoint.config import PYTHIA_EARLY
from castalia.config.values import Values, flatten, is_override, merge, parse_override
from castalia.core.errors import ConfigError, nearest
from castalia.recipes import load_config
from castalia.recipes.load import read_files
from castalia.recipes.presets import preset
from castalia.recipes.words import sort_words
from castalia.runs.config import RunConfig
from castalia.suites.config import STANDARD, Grid, SeedPair, SuiteConfig, read_suite, suite_of

Seed = int | SeedPair
EVERY = 1000
"""Steps between Pythia's later checkpoints."""


@dataclass(frozen=True)
class Member:
    """One run of a suite."""

    name: str
    """Size, data variant and seed: `160m-deduped-seed1`."""
    size: str
    data: str
    seed: Seed
    folder: Path
    words: list[str]
    """What `castalia train` gets."""

    @cached_property
    def config(self) -> RunConfig:
        """The config of the run.

        Raises  ConfigError naming the member.
        """
        try:
            return load_config(self.words)
        except ConfigError as error:
            raise ConfigError(f"member {self.name}: {error}") from None

    @property
    def data_seed(self) -> int:
        """Seed of the data order."""
        return self.config.order_seed

    @property
    def weight_seed(self) -> int:
        """Seed of the start weights."""
        return self.config.start_seed

    @property
    def family(self) -> str:
        """The model family."""
        return self.config.model.family

    @property
    def stream(self) -> tuple[str, int]:
        """Data variant and data seed: members with equal ones read equal batches."""
        return self.data, self.data_seed


@dataclass(frozen=True)
class Suite:
    """Several models on one stream of data."""

    config: SuiteConfig
    members: list[Member]
    """Those that are chosen: by size, then data variant, then seed."""

    @property
    def name(self) -> str:
        """Name of the suite."""
        return self.config.name

    @property
    def folder(self) -> Path:
        """The folder with the members' folders."""
        return self.config.folder

    def __getitem__(self, name: str) -> Member:
        """The member of that name.

        Raises  ConfigError with the names.
        """
        for member in self.members:
            if member.name == name:
                return member
        names = [member.name for member in self.members]
        raise ConfigError(
            f"suite {self.name} has no member {name!r}; its members are"
            f" {', '.join(names)}{nearest(name, names)}"
        )

    @property
    def streams(self) -> dict[tuple[str, int], list[Member]]:
        """The members by data variant and data seed."""
        groups: dict[tuple[str, int], list[Member]] = {}
        for member in self.members:
            groups.setdefault(member.stream, []).append(member)
        return groups


def open_suite(
    words: str | Sequence[str],
    only: str | Sequence[str] | None = None,
    seeds: str | Sequence[int | str] | None = None,
) -> Suite:
    """The suite that `words` name, with its members.

    words  a name (`mini`, `pythia`), a YAML file or the folder of a suite; then overrides of every
           member, `train.steps=20`, or of the suite's folder, `output=runs/x`.
    only   sizes, data variants or members; None takes all.
    seeds  seeds, or the names that members have of them, such as `data-seed1`; None takes the
           suite's `seeds`.
    Raises  ConfigError about the file, an unknown name or seed, or members whose batches differ.

    Examples
        >>> from castalia.suites import open_suite
        >>> suite = open_suite("mini")
        >>> [member.name for member in suite.members][:2]
        ['tiny-seed0', 'tiny-seed1']
    """
    named, *overrides = [words] if isinstance(words, str) else words
    config = with_overrides(read_suite(named), overrides)
    members = [
        make_member(config, size, data, seed)
        for size in config.sizes
        for data in config.data
        for seed in chosen_seeds(config, seeds)
    ]
    return Suite(config, chosen(members, only, config.name))


def with_overrides(config: SuiteConfig, words: Sequence[str]) -> SuiteConfig:
    """The suite with overrides laid over those of its file.

    Raises  ConfigError for a word that is none.
    """
    values = config.model_dump(mode="json")
    for word in words:
        if not is_override(word):
            raise ConfigError(f"{word!r}: after the suite come overrides such as train.steps=20")
        override = parse_override(word)
        if "output" in override:
            # The suite's folder: those of the members are in it.
            values["output"] = override["output"]
        else:
            values["set"] = flatten(values["set"]) | flatten(override)
    return suite_of(values, config.name)


def seed_name(seed: Seed) -> str:
    """A seed in a member's name."""
    if isinstance(seed, int):
        return f"seed{seed}"
    parts = {"data-seed": seed.data_seed, "weight-seed": seed.weight_seed}
    return "-".join(f"{name}{value}" for name, value in parts.items() if value is not None)


def words_in(asked: str | Sequence[int | str]) -> list[str]:
    """The words of a list as a command line has it, `70m,160m`, or as Python does."""
    if isinstance(asked, str):
        asked = asked.split(",")
    return [str(word).strip() for word in asked]


def chosen_seeds(config: SuiteConfig, asked: str | Sequence[int | str] | None) -> list[Seed]:
    """The seeds of the suite that are asked for.

    Raises  ConfigError for one that the suite does not have.
    """
    if asked is None:
        return list(config.seeds)
    by_name = {seed_name(seed): seed for seed in [*config.seeds, *config.extra_seeds]}
    found = []
    for word in words_in(asked):
        name = word
        if word.isdecimal():
            name = f"seed{word}"
        if name not in by_name:
            raise ConfigError(
                f"suite {config.name} has no seed {word!r}; its seeds are"
                f" {', '.join(by_name)}{nearest(name, by_name)}"
            )
        found.append(by_name[name])
    return found


def chosen(members: list[Member], only: str | Sequence[str] | None, suite: str) -> list[Member]:
    """The members that one of the words names: all sizes and data variants that are named, or
    single members.

    Raises  ConfigError for a word that is no size, data variant or member.
    """
    if only is None:
        return members
    words = words_in(only)
    sizes = {member.size for member in members}
    variants = {member.data for member in members}
    names = {member.name for member in members}
    for word in words:
        if word not in sizes | variants | names:
            menu = list(dict.fromkeys(member.size for member in members))
            menu += sorted(variants - {STANDARD})
            raise ConfigError(
                f"suite {suite} has no size or member {word!r}; choose of {', '.join(menu)}, or a"
                f" member{nearest(word, [*menu, *names])}"
            )
    # `70m,deduped` means the deduplicated 70m; `70m,160m` both sizes.
    by_size = sizes.intersection(words) or sizes
    by_data = variants.intersection(words) or variants
    all_named = names.issuperset(words)
    return [
        member
        for member in members
        if member.name in words
        or (not all_named and member.size in by_size and member.data in by_data)
    ]


def make_member(config: SuiteConfig, size: str, data: str, seed: Seed) -> Member:
    """One member."""
    parts = [size]
    if data != STANDARD:
        parts.append(data)
    if seed != config.unnamed_seed:
        parts.append(seed_name(seed))
    name = "-".join(parts)
    folder = config.folder / name
    words = words_of(config, size, data) + seed_words(seed)
    words.append(f"output={json.dumps(str(folder))}")
    return Member(name, size, data, seed, folder, words)


def words_of(config: SuiteConfig, size: str, data: str) -> list[str]:
    """The words of a size and a data variant, without seed and folder."""
    of_size = config.sizes[size]
    if isinstance(of_size, str):
        own = {"preset": of_size}
    else:
        own = dict(of_size)
    variant = dict(config.data[data])
    name = own.pop("preset", None)
    template = variant.pop("preset", None)
    if name is not None and template is not None:
        name = str(template).format(preset=name)
    if name is None and not config.base_words:
        raise ConfigError(f"size {size}: name a preset, or give the suite a base")
    overrides = [grid_of(config), config.set, variant, own]
    if name is None:
        words = list(config.base_words)
    elif not config.base_words:
        words = [str(name)]
    else:
        words = [str(name)]
        # Below the others: they are overrides of the base.
        overrides.insert(0, without_model(config.base_words, str(name)))
    flat: Values = {}
    for layer in overrides:
        flat |= flatten(layer)
    words += [f"{key}={json.dumps(value)}" for key, value in flat.items()]
    if "data.prepared_in" not in flat and makes_data(words, f"size {size}"):
        words.append(f"data.prepared_in={json.dumps(str(config.folder / 'data'))}")
    return words


def makes_data(words: Sequence[str], where: str) -> bool:
    """Whether a run of these words makes its token files, which members then share.

    Raises  ConfigError that begins with `where`.
    """
    try:
        data = load_config(words).data
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return bool(data.texts or (data.corpus and not data.train_prefixes))


def without_model(words: Sequence[str], name: str) -> Values:
    """The values of the base but for its model, of which the ids of the data and the length stay.

    They are laid over the preset `name`, so that two families read the same rows.
    """
    named = sort_words(words)
    below = {}
    if named.presets:
        below = preset(named.presets[0])
    files, _ = read_files(named.files)
    values = merge(below, files, *(parse_override(word) for word in named.overrides))
    model = values.pop("model", {})
    values.pop("recipe", None)
    own = preset(name)["model"]
    kept = {
        key: model[key] for key in ("vocab_size", "make_vocab_size_divisible_by") if key in model
    }
    longest = max(
        values.get("data", {}).get("seq_length", 0), own.get("max_position_embeddings", 0)
    )
    return values | {"model": kept | {"max_position_embeddings": longest}}


def grid_of(config: SuiteConfig) -> Values:
    """The overrides of the checkpoint grid."""
    grid = config.checkpoints
    if grid is None:
        return {}
    if grid == "pythia":
        grid = Grid(steps=PYTHIA_EARLY, every=EVERY)
    elif isinstance(grid, list):
        grid = Grid(steps=grid)
    return {"checkpoint.steps": grid.steps, "checkpoint.every": grid.every}


def seed_words(seed: Seed) -> list[str]:
    """The overrides of a seed."""
    if isinstance(seed, int):
        return [f"seed={seed}"]
    given = seed.model_dump(exclude_none=True)
    return [f"{name}={value}" for name, value in given.items()]
