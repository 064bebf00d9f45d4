"""Corpora built here, out of text that every Python installation carries: `python` for the demo, `tiny` for `debug`.

<folder>/<source>.train.jsonl  <source>.valid.jsonl            one {"name", "text"} a document
         <source>.train.bin/.idx  <source>.valid.bin/.idx      their tokens
         tokenizer.json                                        unless the tokenizer is `bytes`
         corpus.json                                           written last: what stands in the files
"""

import json
import platform
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, write_json
from castalia.core.registry import Registry
from castalia.corpus import prepare
from castalia.data import load_tokenizer, train_tokenizer
from castalia.data.tokenizer import END_OF_TEXT, PADDING_TOKEN
from castalia.demo import texts
from castalia.demo.heldout import FEWEST, Split, fingerprint, split_sources
from castalia.demo.texts import Document
from castalia.monitor import size_text
from castalia.train.config import RunConfig

FORMAT = 1
"""Rises when the same name comes to mean another corpus, so that an older folder is built again."""
PARTS = ("train", "valid")


class Source(NamedTuple):
    """Where one source's documents come from, and how much of them is taken."""

    read: Callable[[], list[Document]]
    largest: int
    """Bytes at most; a longer source is sampled by whole documents."""
    about: str
    """What it is, for people."""


class Recipe(NamedTuple):
    """One corpus: its sources, and the size of the tokenizer that is trained on it; None means bytes."""

    sources: dict[str, Source]
    vocab_size: int | None = None


CORPORA: Registry[Recipe] = Registry("corpus")
CORPORA.register("python")(
    Recipe(
        {
            "stdlib": Source(texts.library_code, 4_000_000, "modules of the standard library"),
            "tests": Source(texts.library_tests, 3_000_000, "tests of the standard library"),
            "reference": Source(
                texts.language_reference, 2_000_000, "the language reference behind help()"
            ),
            "docstrings": Source(
                texts.package_docstrings, 1_500_000, "docstrings of torch, numpy and pydantic"
            ),
            "packages": Source(
                texts.package_papers, 1_500_000, "READMEs and licences of installed packages"
            ),
        },
        vocab_size=4096,
    )
)
CORPORA.register("tiny")(
    Recipe(
        {
            "stdlib": Source(texts.few_modules, 400_000, "a few modules of the standard library"),
            "reference": Source(
                texts.language_reference, 200_000, "the language reference behind help()"
            ),
        }
    )
)


class CorpusPaths(NamedTuple):
    """A corpus on disk."""

    folder: Path
    tokenizer: str
    """A tokenizer.json, or `bytes`."""
    facts: dict[str, Any]
    """The contents of corpus.json."""

    @property
    def sources(self) -> list[str]:
        """Names of the sources."""
        return list(self.facts["sources"])

    def prefixes(self, part: str) -> list[str]:
        """Prefixes of the token files of `train` or `valid`, in the order of `sources`."""
        return [str(self.folder / f"{part}/{source}") for source in self.sources]

    def document_bytes(self, source: str) -> list[int]:
        """UTF-8 bytes of each held-out document of a source."""
        counts: list[int] = self.facts["sources"][source]["valid"]["document_bytes"]
        return counts


def build_corpus(name: str, folder: str | Path, say: Callable[[str], None] = print) -> CorpusPaths:
    """Build the corpus `name` in `folder`, or find it there complete and do nothing.

    `say` takes one line for each step that is done, and for each source that this Python does not have.
    Raises  ConfigError on an unknown name; DataError when this installation carries too little text.
    """
    recipe, folder = CORPORA[name], Path(folder)
    found = find_corpus(name, folder)
    if found is not None:
        return found
    say(f"corpus {name}: reading what Python {platform.python_version()} carries")
    splits = read_sources(recipe, say)
    for source, split in splits.items():
        for part in PARTS:
            write_documents(folder / f"{part}/{source}.jsonl", getattr(split, part))
    tokenizer = make_tokenizer(recipe, folder, splits, say)
    facts = tokenize(folder, splits, tokenizer, say)
    about = {source: recipe.sources[source].about for source in splits}
    sources = {source: {"about": about[source], **facts[source]} for source in splits}
    value = {
        "corpus": name,
        "format": FORMAT,
        "python": platform.python_version(),
        "tokenizer": tokenizer,
    }
    write_json(folder / "corpus.json", value | {"sources": sources})
    return CorpusPaths(folder, tokenizer_path(folder, tokenizer), value | {"sources": sources})


def find_corpus(name: str, folder: Path) -> CorpusPaths | None:
    """The complete corpus `name` in `folder`; None when it is not there, or not as corpus.json says."""
    try:
        facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        whole = facts["corpus"] == name and facts["format"] == FORMAT
        for source, parts in facts["sources"].items() if whole else ():
            for part in PARTS:
                for end in (".jsonl", ".bin", ".idx"):
                    size = (folder / f"{part}/{source}{end}").stat().st_size
                    whole = whole and size == parts[part]["files"][end]
        if not whole or (
            facts["tokenizer"] != "bytes" and not (folder / facts["tokenizer"]).is_file()
        ):
            return None
        return CorpusPaths(folder, tokenizer_path(folder, facts["tokenizer"]), facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokenizer_path(folder: Path, tokenizer: str) -> str:
    """What `load_tokenizer` takes: `bytes`, or the path of the file in `folder`."""
    return tokenizer if tokenizer == "bytes" else str(folder / tokenizer)


def read_sources(recipe: Recipe, say: Callable[[str], None]) -> dict[str, Split]:
    """The sources that this Python has enough of, split into train and held-out.

    Raises  DataError if none is left.
    """
    documents = {
        name: at_most(usable(source.read()), source.largest)
        for name, source in recipe.sources.items()
    }
    splits = split_sources(documents)
    for name, source in recipe.sources.items():
        if len(splits[name].valid) < FEWEST:
            say(
                f"corpus: left out {name} ({source.about}): this Python has {len(documents[name])} such documents"
            )
            del splits[name]
    if not splits:
        raise DataError(
            "this Python carries none of the texts that the corpus is made of (standard library, its tests,"
            " pydoc_data); use a full installation, or name your own text with data.train="
        )
    return splits


def usable(documents: Sequence[Document]) -> list[Document]:
    """Documents of whole Unicode that do not spell out a special token, which would become that token."""
    whole = (d for d in documents if not any("\ud800" <= letter <= "\udfff" for letter in d.text))
    return [d for d in whole if END_OF_TEXT not in d.text and PADDING_TOKEN not in d.text]


def at_most(documents: Sequence[Document], largest: int) -> list[Document]:
    """Documents of at most `largest` bytes together: the first by hash of their text, given back in their order."""
    chosen, left = set(), largest
    for document in sorted(documents, key=lambda document: fingerprint(document.text)):
        size = len(document.text.encode("utf-8"))
        if size <= left:
            chosen.add(document.name)
            left -= size
    return [document for document in documents if document.name in chosen]


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """One JSON object a line."""
    with atomic_write(path) as file:
        file.writelines(
            json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents
        )


def make_tokenizer(
    recipe: Recipe, folder: Path, splits: dict[str, Split], say: Callable[[str], None]
) -> str:
    """Train the recipe's tokenizer on the training documents; returns its name in corpus.json."""
    if recipe.vocab_size is None:
        return "bytes"
    words = (document.text for split in splits.values() for document in split.train)
    tokenizer = train_tokenizer(words, recipe.vocab_size, folder / "tokenizer.json")
    say(
        f"tokenizer: {tokenizer.vocab_size} tokens, byte-level BPE, trained on the training documents"
    )
    return "tokenizer.json"


def tokenize(
    folder: Path, splits: dict[str, Split], tokenizer: str, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Write the token files, a document's tokens followed by the end-of-document token; returns what is in them."""
    loaded = load_tokenizer(tokenizer_path(folder, tokenizer))
    facts: dict[str, dict[str, Any]] = {}
    for source, split in splits.items():
        facts[source] = {}
        for part in PARTS:
            prefix = folder / f"{part}/{source}"
            prepared = prepare([f"{prefix}.jsonl"], str(prefix), loaded, append_eod=True)
            facts[source][part] = part_facts(prefix, getattr(split, part), prepared.tokens)
        train, valid = facts[source]["train"], facts[source]["valid"]
        say(
            f"  {source:<11} {train['documents']:>4} documents {size_text(train['bytes']):>8}"
            f" {train['tokens']:>9,} tokens"
            f"   held out {valid['documents']:>3}, {size_text(valid['bytes']):>8}"
        )
    return facts


def part_facts(prefix: Path, documents: Sequence[Document], tokens: int) -> dict[str, Any]:
    """Counts of one part of one source, the sizes of its files, and for held-out text the bytes of each document."""
    sizes = [len(document.text.encode("utf-8")) for document in documents]
    facts: dict[str, Any] = {"documents": len(sizes), "bytes": sum(sizes), "tokens": tokens}
    facts["files"] = {
        end: Path(f"{prefix}{end}").stat().st_size for end in (".jsonl", ".bin", ".idx")
    }
    if prefix.parent.name == "valid":
        facts["document_bytes"] = sizes
        packed = sum(len(zlib.compress(document.text.encode("utf-8"), 9)) for document in documents)
        facts["zlib_bits_per_byte"] = 8 * packed / sum(sizes)
    return facts


def ensure_corpus(config: RunConfig, say: Callable[[str], None] = print) -> RunConfig:
    """Build the corpus that the config names under its output folder, and name its files in the config.

    A config with training data of its own, or that names no corpus, comes back as it is.
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
