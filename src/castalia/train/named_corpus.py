"""The corpus that a config names in place of token files: built once, in the folder of the run."""

from pathlib import Path

from castalia.core.errors import ConfigError
from castalia.corpora.build import Say, build_corpus
from castalia.data import load_tokenizer
from castalia.distributed import World
from castalia.train.config import RunConfig


def ensure_corpus(config: RunConfig, say: Say = print) -> RunConfig:
    """Build the corpus of the config in its output folder; returns the config with its files.

    A config with training data of its own, or without a corpus, is returned as it is.
    Raises  ConfigError if the corpus is unknown or its tokenizer has more tokens than the model.
    """
    if config.data.train or config.data.corpus is None:
        return config
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


def ensure_on_all(config: RunConfig, world: World) -> RunConfig:
    """`ensure_corpus` on every rank: the leading one builds, and the others wait."""
    if world.leads:
        config = ensure_corpus(config)
    world.wait()
    # Returns at once on the rank that has built.
    return ensure_corpus(config)
