"""The token and label files that a data config names, opened and checked against each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset
from castalia.data.labels import Labels, open_labels, read_rewards
from castalia.data.order import weight_by_num_documents
from castalia.data.pair_files import open_references, require_pair
from castalia.data.sidecar import require_tokenizer, tokenizer_facts
from castalia.storage.twins import use_cache
from castalia.tokenizers.tokenizer import load_tokenizer

NEGLIGIBLE = 1e-6
"""Share below which a source may be left out of a blend. Weights that people write to be trained on
are larger, and their order is GPT-NeoX's however short the run."""


@dataclass(frozen=True)
class Files:
    """The files of some sources, in the same order everywhere."""

    tokens: list[IndexedDataset]
    labels: Labels = None
    """A label file for each source; None where every token is a target."""
    label_weights: Labels = None
    """How much each target counts, a file for each source; None where all count 1."""
    reference: Labels = None
    """Log-probabilities under a reference model, a file for each source; None without."""
    rewards: Sequence[NDArray[np.float32]] | None = None
    """A number for each document of each source; None without."""
    rejected: "Files | None" = None
    """The other side of the rows: the rejected answers of pairs, whose preferred ones `tokens` are,
    or prompts with the answers to others; None for texts."""

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, number: int) -> "Files":
        """The files of one source."""
        chosen = slice(number, number + 1)
        return Files(
            self.tokens[chosen],
            self.labels and self.labels[chosen],
            self.label_weights and self.label_weights[chosen],
            self.reference and self.reference[chosen],
            self.rewards and self.rewards[chosen],
            self.rejected and self.rejected.of(number),
        )

    @property
    def all_tokens(self) -> list[IndexedDataset]:
        """The token files of both sides."""
        return self.tokens + (self.rejected.tokens if self.rejected else [])

    @property
    def beside(self) -> list[IndexedDataset]:
        """Label, weight and reference files of both sides."""
        own = [*(self.labels or ()), *(self.label_weights or ()), *(self.reference or ())]
        return own + (self.rejected.beside if self.rejected else [])


def check_names(config: DataConfig) -> None:
    """Check that the config names training data, and validation data at most once.

    Raises  ConfigError if not.
    """
    if not config.train_prefixes:
        raise ConfigError(
            "data.train is empty: name the prefix of a token file made by `castalia prepare`"
        )
    if config.split is not None and config.valid_prefixes:
        raise ConfigError(
            "data.split and data.valid both choose the validation data: set one of them to null"
        )


def open_files(config: DataConfig) -> tuple[Files, Files]:
    """The train and valid files, whose records agree with the config's tokenizer. Both parts of a
    split use those of train.

    Raises  DataError if token files were made with different tokenizers, or do not match what
            belongs to them; ConfigError if with another tokenizer than the config's: the model
            would learn one vocabulary and be read with another.
    """
    use_cache(config.cache, config.cache_gib)
    train = files_of(config, "")
    valid = files_of(config, "valid_")
    tokens = train.all_tokens + valid.all_tokens
    has_tokenizer = tokenizer_facts(tokens).get("tokenizer")
    if has_tokenizer and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        for dataset in tokens:
            require_tokenizer(dataset.prefix, tokenizer, "data.tokenizer, or set it to null")
    return train, train if config.split is not None else valid


def files_of(config: DataConfig, role: str) -> Files:
    """The files of the train sources (role "") or of the valid ones (role "valid_").

    Raises  ConfigError, DataError if labels or references do not match their tokens, or the two
            sides of pairs each other.
    """
    if not config.paired:
        tokens = [IndexedDataset(path) for path in getattr(config, role.rstrip("_") or "train")]
        names = (f"{role}labels", f"{role}label_weights")
        labels = open_labels(getattr(config, names[0]), tokens, names[0])
        weights = open_labels(getattr(config, names[1]), tokens, names[1], are_weights=True)
        rewards = open_rewards(getattr(config, f"{role}rewards"), tokens)
        others = mismatched_files(config, role, tokens)
        return Files(tokens, labels, weights, rewards=rewards, rejected=others)
    names = (f"{role}chosen", f"{role}rejected")
    both = [[IndexedDataset(path) for path in getattr(config, name)] for name in names]
    for pair in zip(*both, strict=True):
        require_pair(*pair)
    sides = []
    for name, tokens in zip(names, both, strict=True):
        labels = open_labels(getattr(config, f"{name}_labels"), tokens, f"{name}_labels")
        paths = getattr(config, f"{name}_reference")
        references = open_references(paths, tokens, config.seq_length)
        sides.append(Files(tokens, labels, reference=references))
    rewards = open_rewards(getattr(config, f"{role}rewards"), both[0])
    return replace(sides[0], rewards=rewards, rejected=sides[1])


def mismatched_files(
    config: DataConfig, role: str, tokens: Sequence[IndexedDataset]
) -> Files | None:
    """The files of prompts with the answers to others; None where the config names none.

    Raises  ConfigError if there is not one for each source; DataError if they do not match.
    """
    name = f"{role}mismatched"
    paths = getattr(config, name)
    if not paths:
        return None
    if len(paths) != len(tokens):
        raise ConfigError(
            f"data.{name} has {len(paths)} files for {len(tokens)} token files; give one for each,"
            " or leave it out: the run makes them"
        )
    others = [IndexedDataset(path) for path in paths]
    for pair in zip(tokens, others, strict=True):
        require_pair(*pair)
    return Files(others, open_labels(getattr(config, f"{name}_labels"), others, f"{name}_labels"))


def open_rewards(
    paths: Sequence[str], tokens: Sequence[IndexedDataset]
) -> list[NDArray[np.float32]] | None:
    """The number of each document of each token file; None if no paths are given.

    Raises  ConfigError if their numbers differ; DataError if a file does not match.
    """
    if not paths:
        return None
    if len(paths) != len(tokens):
        raise ConfigError(
            f"{len(paths)} reward files for {len(tokens)} token files; give one for each"
        )
    return [read_rewards(path, file) for path, file in zip(paths, tokens, strict=True)]


def with_document_weights(
    config: DataConfig, train: Sequence[IndexedDataset], valid: Sequence[IndexedDataset]
) -> DataConfig:
    """The config with the weights that data.document_alpha stands for; else as it is."""
    alpha = config.document_alpha
    if alpha is None:
        return config
    weights = {"weights": weight_by_num_documents([len(file) for file in train], alpha)}
    if valid:
        weights["valid_weights"] = weight_by_num_documents([len(file) for file in valid], alpha)
    return config.model_copy(update=weights)


def shares_of(weights: Sequence[float] | None, sources: int) -> list[float]:
    """Weights divided by their sum; equal shares without weights."""
    raw = [1.0] * sources if weights is None else weights
    total = sum(raw)
    return [weight / total for weight in raw]


def left_out(weights: Sequence[float] | None, sources: int, rows: int) -> list[bool]:
    """Which sources a blend of `rows` rows leaves out, (sources,).

    GPT-NeoX's rule draws every source among the first places, even one of weight 0: at place 1 all
    sources that have no row yet are tied or nearly so. Left out are therefore weight 0, and a share
    below `NEGLIGIBLE` to which the whole run owes less than half a row. Every other source keeps
    the place that GPT-NeoX gives it.
    """
    shares = shares_of(weights, sources)
    return [share < NEGLIGIBLE and rows * share < 0.5 for share in shares]


def source_names(paths: Sequence[str]) -> list[str]:
    """A distinct name for each prefix: the file name, else the whole path, else with a number."""
    names = [Path(path).name.removesuffix(".bin").removesuffix(".idx") for path in paths]
    counts = Counter(names)
    for number, path in enumerate(paths):
        if counts[names[number]] > 1:
            names[number] = path
    # The same path may be given twice.
    counts = Counter(names)
    for number, name in enumerate(names):
        if counts[name] > 1:
            names[number] = f"{name}#{number}"
    return names
