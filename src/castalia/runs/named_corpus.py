"""What a config names in place of token files: a corpus, built once in the folder of the run, or
files of text, prepared once."""

from pathlib import Path
from typing import TYPE_CHECKING

from castalia.core.errors import ConfigError
from castalia.core.files import claimed
from castalia.corpora.build import Say, build_corpus
from castalia.corpora.conversations import FACTS, WAIT_SECONDS, options_of, prepared_text
from castalia.corpora.mismatched import with_mismatched
from castalia.corpora.records import TEXT_KINDS
from castalia.corpus.forms import WEIGHTS
from castalia.data import load_tokenizer
from castalia.runs.config import RunConfig

if TYPE_CHECKING:
    # Importing it takes seconds of torch, which verbs that read rows do not need.
    from castalia.distributed import World


def ensure_corpus(config: RunConfig, say: Say = print) -> RunConfig:
    """Make the token files of the config, where it names none; returns the config with its files.

    Raises  ConfigError if the corpus is unknown or its tokenizer has more tokens than the model;
            DataError about a record of a text file.
    """
    if config.data.texts:
        return ensure_mismatched(ensure_texts(config, say))
    if config.data.train_prefixes:
        return ensure_mismatched(config)
    if config.data.corpus is None:
        return config
    if config.data.prepared_in:
        # A folder of several corpora, which runs share: the first one builds, the others wait.
        folder = Path(config.data.prepared_in) / config.data.corpus
        with claimed(folder, WAIT_SECONDS):
            corpus = build_corpus(config.data.corpus, folder, say)
    else:
        corpus = build_corpus(config.data.corpus, Path(config.output) / "data", say)
    vocab_size = load_tokenizer(corpus.tokenizer).vocab_size
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of the corpus"
            f" {config.data.corpus!r} has {vocab_size} tokens; set model.vocab_size={vocab_size}"
        )
    paths = {
        "train": corpus.prefixes("train"),
        "valid": corpus.prefixes("valid"),
        "tokenizer": corpus.tokenizer,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


def ensure_texts(config: RunConfig, say: Say = print) -> RunConfig:
    """Prepare the text files of the config; returns the config with the token files.

    Raises  ConfigError without a tokenizer, or if the config names other token files as well;
            DataError about a record, with file and line.
    """
    data = config.data
    (kind,) = data.texts
    if is_prepared(config) and not all(Path(path).exists() for path in getattr(data, kind)):
        # A run that goes on after its text was moved away.
        return config
    if data.train_prefixes and not is_prepared(config):
        raise ConfigError(
            f"data.{'chosen' if data.chosen else 'train'} and data.{kind} both name the training"
            " data; give one of them"
        )
    if data.tokenizer is None:
        raise ConfigError(
            f"data.{kind} needs data.tokenizer; model.start brings its own where it has one"
        )
    tokenizer = load_tokenizer(data.tokenizer)
    options = options_of(data.chat_template, data.chat_roles, data.chat_only_last)
    folder = data.prepared_in or Path(config.output) / "data"
    update: dict[str, list[str]] = {}
    for part in ("", "valid_"):
        paths = getattr(data, f"{part}{kind}")
        prepared = prepared_text(kind, paths, tokenizer, options, folder, say)
        weighted = any(text.weighted for text in prepared)
        for (_, output), name in TEXT_KINDS[kind].fields.items():
            files = [text.files[name] for text in prepared]
            if output == WEIGHTS and not weighted:
                # All targets count alike: a file of ones would only slow the loss down.
                files = []
            update[valid_name(name) if part else name] = files
    return config.model_copy(update={"data": data.model_copy(update=update)})


def ensure_mismatched(config: RunConfig) -> RunConfig:
    """The config with prompts with the answers to others, where its loss asks for these."""
    if getattr(config.loss, "kl", None) != "mismatched":
        return config
    data = with_mismatched(config.data, f"{config.output}/data")
    return config.model_copy(update={"data": data})


def valid_name(name: str) -> str:
    """The field with the held-out files of a field: that of `train` is `valid`."""
    return "valid" if name == "train" else f"valid_{name}"


def is_prepared(config: RunConfig) -> bool:
    """Whether the config names token files that an earlier start of its run prepared."""
    prefixes = config.data.train_prefixes
    return bool(prefixes) and all((Path(prefix).parent / FACTS).is_file() for prefix in prefixes)


def ensure_on_all(config: RunConfig, world: "World") -> RunConfig:
    """`ensure_corpus` on every rank: the leading one builds, and the others wait."""
    if world.leads:
        config = ensure_corpus(config)
    world.wait()
    # Returns at once on the rank that has built.
    return ensure_corpus(config)
