"""Corpora built from text of every Python installation: `python` for the demo, `tiny` for `debug`;
`mini` has generated texts beside it, for the miniature suite.

<folder>/train/<source>.jsonl   valid/<source>.jsonl      one {"name", "text"} a document
         train/<source>.bin/.idx  valid/<source>.bin/.idx   their tokens
         tokenizer.json                                    unless the tokenizer is `bytes`
         corpus.json                                       written last: the facts of all files
"""

import json
import platform
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, write_json
from castalia.core.registry import Registry
from castalia.corpora import known_texts, texts
from castalia.corpora.heldout import FEWEST, Split, fingerprint, split_sources
from castalia.corpora.texts import TextDocument
from castalia.corpus import prepare
from castalia.data import load_tokenizer, train_tokenizer
from castalia.monitor import size_text
from castalia.tokenizers.tokenizer import END_OF_TEXT, PADDING_TOKEN

FORMAT = 1
"""Raised when a name comes to mean another corpus, so that older folders are built again."""
PARTS = ("train", "valid")
SUFFIXES = (".jsonl", ".bin", ".idx")

Say = Callable[[str], None]
"""Takes one line of progress."""


class TextSource(NamedTuple):
    """One source of a corpus before it is built: a reader of documents and a limit."""

    read: Callable[[], list[TextDocument]]
    largest: int
    """Most bytes; of a longer source whole documents are sampled."""
    about: str
    """Description for people."""
    copies: known_texts.CopiesOf | None = None
    """Of generated documents: how often each stands in the training part, 0 for held out. None
    removes repeated documents and holds out some of the others."""


class CorpusRecipe(NamedTuple):
    """The sources of one corpus and the size of its tokenizer."""

    sources: dict[str, TextSource]
    vocab_size: int | None = None
    """Ids of the tokenizer that is trained on the corpus; None means bytes."""


CORPORA: Registry[CorpusRecipe] = Registry("corpus")
"""The corpora that `build_corpus` and `data.corpus` know, by name."""
CORPORA.register("python")(
    CorpusRecipe(
        {
            "stdlib": TextSource(texts.library_code, 4_000_000, "modules of the standard library"),
            "tests": TextSource(texts.library_tests, 3_000_000, "tests of the standard library"),
            "reference": TextSource(
                texts.language_reference, 2_000_000, "the language reference behind help()"
            ),
            "docstrings": TextSource(
                texts.package_docstrings, 1_500_000, "docstrings of torch, numpy and pydantic"
            ),
            "packages": TextSource(
                texts.package_papers, 1_500_000, "READMEs and licences of installed packages"
            ),
        },
        vocab_size=4096,
    )
)
CORPORA.register("tiny")(
    CorpusRecipe(
        {
            "stdlib": TextSource(
                texts.few_modules, 400_000, "a few modules of the standard library"
            ),
            "reference": TextSource(
                texts.language_reference, 200_000, "the language reference behind help()"
            ),
        }
    )
)
CORPORA.register("mini")(
    CorpusRecipe(
        {
            "python": TextSource(
                texts.modules_and_reference, 330_000, "modules and language reference of Python"
            ),
            "passages": TextSource(
                known_texts.passages,
                0,
                "passages that are repeated 1, 4, 16, 64 and 256 times",
                known_texts.copies_of_passage,
            ),
            "arithmetic": TextSource(
                known_texts.arithmetic,
                0,
                "sums and products, some numbers far more frequent than others",
                known_texts.once_or_held_out,
            ),
            "people": TextSource(
                known_texts.people,
                0,
                "people with their professions and pronouns",
                known_texts.once_or_held_out,
            ),
        },
        vocab_size=2048,
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


def build_corpus(name: str, folder: str | Path, say: Say = print) -> CorpusPaths:
    """Build the corpus `name` in `folder`; a complete one is returned as it is.

    `say` gets one line for each step, and for each source that this Python lacks.
    Raises  ConfigError on an unknown name; DataError if this installation has too little text.
    """
    recipe = CORPORA[name]
    folder = Path(folder)
    existing = find_corpus(name, folder)
    if existing is not None:
        return existing
    say(f"corpus {name}: reading the texts of Python {platform.python_version()}")
    splits = read_sources(recipe, say)
    for source, split in splits.items():
        for part in PARTS:
            write_documents(folder / f"{part}/{source}.jsonl", getattr(split, part))
    tokenizer = make_tokenizer(recipe, folder, splits, say)
    counts = tokenize(folder, splits, tokenizer, say)
    sources = {}
    for source in splits:
        sources[source] = {"about": recipe.sources[source].about, **counts[source]}
    facts = {
        "corpus": name,
        "format": FORMAT,
        "python": platform.python_version(),
        "tokenizer": tokenizer,
        "sources": sources,
    }
    # Last, as the mark of a complete corpus: an interrupted build is done again.
    write_json(folder / "corpus.json", facts)
    return CorpusPaths(folder, tokenizer_path(folder, tokenizer), facts)


def find_corpus(name: str, folder: Path) -> CorpusPaths | None:
    """The corpus `name` in `folder`; None if it is incomplete or its files have other sizes."""
    try:
        facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if facts["corpus"] != name or facts["format"] != FORMAT:
            return None
        for source, parts in facts["sources"].items():
            for part in PARTS:
                for suffix in SUFFIXES:
                    size = (folder / f"{part}/{source}{suffix}").stat().st_size
                    if size != parts[part]["files"][suffix]:
                        return None
        tokenizer = facts["tokenizer"]
        if tokenizer != "bytes" and not (folder / tokenizer).is_file():
            return None
        return CorpusPaths(folder, tokenizer_path(folder, tokenizer), facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a file is missing, or corpus.json is damaged


def tokenizer_path(folder: Path, tokenizer: str) -> str:
    """The tokenizer as `load_tokenizer` takes it: `bytes`, or the path of the file in `folder`."""
    if tokenizer == "bytes":
        return tokenizer
    return str(folder / tokenizer)


def read_sources(recipe: CorpusRecipe, say: Say) -> dict[str, Split]:
    """The recipe's sources that this Python has enough of, split into train and held-out.

    Raises  DataError if none is left.
    """
    found = {name: source for name, source in recipe.sources.items() if source.copies is None}
    documents = {
        name: at_most(usable(source.read()), source.largest) for name, source in found.items()
    }
    splits = split_sources(documents)
    for name, source in found.items():
        if len(splits[name].valid) < FEWEST:
            count = len(documents[name])
            say(f"corpus: skipped {name} ({source.about}): this Python has {count} such documents")
            del splits[name]
    if not splits:
        raise DataError(
            "this Python has none of the texts of the corpus (standard library, its tests,"
            " pydoc_data); use a full installation, or name your own text with data.train="
        )
    for name, source in recipe.sources.items():
        if source.copies is not None:
            splits[name] = split_generated(source.read(), source.copies)
    return splits


def split_generated(documents: Sequence[TextDocument], copies: known_texts.CopiesOf) -> Split:
    """Each document as often as it shall stand in the training part, or held out."""
    train = [document for document in documents for _ in range(copies(document))]
    return Split(train, [document for document in documents if copies(document) == 0])


def usable(documents: Sequence[TextDocument]) -> list[TextDocument]:
    """Documents of valid Unicode that do not contain the text of a special token."""
    chosen = []
    for document in documents:
        # The text of a special token would become that token.
        has_special = END_OF_TEXT in document.text or PADDING_TOKEN in document.text
        if has_utf8(document.text) and not has_special:
            chosen.append(document)
    return chosen


def has_utf8(text: str) -> bool:
    """Whether a text has an encoding in UTF-8: a lone surrogate has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def at_most(documents: Sequence[TextDocument], largest: int) -> list[TextDocument]:
    """Documents of at most `largest` bytes together, in their order.

    They are taken by the hash of their text, so the same installation gives the same sample.
    """
    chosen = set()
    left = largest
    for document in sorted(documents, key=lambda document: fingerprint(document.text)):
        size = len(document.text.encode("utf-8"))
        if size <= left:
            chosen.add(document.name)
            left -= size
    return [document for document in documents if document.name in chosen]


def write_documents(path: Path, documents: Sequence[TextDocument]) -> None:
    """Write one JSON object a line."""
    with atomic_write(path) as file:
        for document in documents:
            file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")


def make_tokenizer(recipe: CorpusRecipe, folder: Path, splits: dict[str, Split], say: Say) -> str:
    """Train the recipe's tokenizer on the training documents; returns its name in corpus.json."""
    if recipe.vocab_size is None:
        return "bytes"
    words = (document.text for split in splits.values() for document in split.train)
    tokenizer = train_tokenizer(words, recipe.vocab_size, folder / "tokenizer.json")
    say(
        f"tokenizer: {tokenizer.vocab_size} tokens, byte-level BPE, trained on the training"
        " documents"
    )
    return "tokenizer.json"


def tokenize(
    folder: Path, splits: dict[str, Split], tokenizer: str, say: Say
) -> dict[str, dict[str, Any]]:
    """Write the token files, an end-of-document token after each document; returns their facts."""
    encoder = load_tokenizer(tokenizer_path(folder, tokenizer))
    facts: dict[str, dict[str, Any]] = {}
    for source, split in splits.items():
        facts[source] = {}
        for part in PARTS:
            prefix = folder / f"{part}/{source}"
            prepared = prepare(
                [f"{prefix}.jsonl"], str(prefix), encoder, append_eod=True, overwrite=True
            )
            facts[source][part] = part_facts(prefix, getattr(split, part), prepared.tokens)
        train = facts[source]["train"]
        valid = facts[source]["valid"]
        say(
            f"  {source:<11} {train['documents']:>4} documents {size_text(train['bytes']):>8}"
            f" {train['tokens']:>9,} tokens"
            f"   held out {valid['documents']:>3}, {size_text(valid['bytes']):>8}"
        )
    return facts


def part_facts(prefix: Path, documents: Sequence[TextDocument], tokens: int) -> dict[str, Any]:
    """Counts and file sizes of one part of one source; for held-out text more about its bytes."""
    sizes = [len(document.text.encode("utf-8")) for document in documents]
    facts: dict[str, Any] = {"documents": len(sizes), "bytes": sum(sizes), "tokens": tokens}
    facts["files"] = {suffix: Path(f"{prefix}{suffix}").stat().st_size for suffix in SUFFIXES}
    if prefix.parent.name == "valid":
        # Bits per byte divide by these bytes; zlib's are the yardstick of the report.
        facts["document_bytes"] = sizes
        packed = sum(len(zlib.compress(document.text.encode("utf-8"), 9)) for document in documents)
        facts["zlib_bits_per_byte"] = 8 * packed / sum(sizes)
    return facts
