"""The token and label files that a data config names, opened and checked against each other."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from castalia.core.errors import ConfigError
from castalia.data.config import DataConfig
from castalia.data.indexed import IndexedDataset
from castalia.data.labels import Labels, open_labels
from castalia.data.order import weight_by_num_documents
from castalia.data.sidecar import require_tokenizer, tokenizer_facts
from castalia.data.tokenizer import load_tokenizer

NEGLIGIBLE = 1e-6
"""Share below which a source may be left out of a blend. Weights that people write to be trained on
are larger, and their order is GPT-NeoX's however short the run."""


def check_names(config: DataConfig) -> None:
    """Check that the config names training data, and validation data at most once.

    Raises  ConfigError if not.
    """
    if not config.train:
        raise ConfigError(
            "data.train is empty: name the prefix of a token file made by `castalia prepare`"
        )
    if config.split is not None and config.valid:
        raise ConfigError(
            "data.split and data.valid both choose the validation data: set one of them to null"
        )


def open_sources(config: DataConfig) -> tuple[list[IndexedDataset], list[IndexedDataset]]:
    """The train and valid token files, whose records agree with the config's tokenizer.

    Raises  DataError if the files were made with different tokenizers, ConfigError if with another
            than the config's: the model would learn one vocabulary and be read with another.
    """
    train = [IndexedDataset(path) for path in config.train]
    valid = [IndexedDataset(path) for path in config.valid]
    has_tokenizer = tokenizer_facts(train + valid).get("tokenizer")
    if has_tokenizer and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        for dataset in train + valid:
            require_tokenizer(dataset.prefix, tokenizer, "data.tokenizer, or set it to null")
    return train, valid


def label_files(
    config: DataConfig, train: list[IndexedDataset], valid: list[IndexedDataset]
) -> tuple[Labels, Labels]:
    """The label files of the train and of the valid rows. Both parts of a split use those of train.

    Raises  ConfigError, DataError if they do not match the token files.
    """
    labels = open_labels(config.labels, train, "labels")
    if config.split is not None:
        return labels, labels
    return labels, open_labels(config.valid_labels, valid, "valid_labels")


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
