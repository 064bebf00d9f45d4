"""The corpus of the mixing benchmark: local text in sources of very different size and entropy.

Half of the sources come with Python, the others with Debian's documentation if it is installed.
Three sources diagnose a mixer: `noise` cannot be learned, `trivial` is learned at once, and
`headers-twin` is a random half of another source, so that a mixer that only counts sources gives
that text double weight. Held-out text does not repeat training text (castalia.corpora.heldout).
"""

import gzip
import hashlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from castalia.corpora import texts
from castalia.corpora.build import CORPORA, CorpusPaths, CorpusRecipe, TextSource, build_corpus
from castalia.corpora.texts import SMALLEST_DOCUMENT, TextDocument

NAME = "mixing"
PIECE = 16 * 1024
"""Characters of a document; longer texts from outside Python are cut."""
DOC = Path("/usr/share/doc")
MAN = Path("/usr/share/man")
ENGLISH = {f"man{section}" for section in range(1, 9)}


def pieces(name: str, text: str) -> Iterator[TextDocument]:
    """Cut a text into documents of at most PIECE characters."""
    for number, start in enumerate(range(0, len(text), PIECE)):
        part = text[start : start + PIECE]
        if len(part) >= SMALLEST_DOCUMENT:
            yield TextDocument(f"{name}#{number}", part)


def read_all(files: Iterable[Path]) -> list[TextDocument]:
    """Files, gzipped or not, in pieces; unreadable and non-UTF-8 files are skipped."""
    documents: list[TextDocument] = []
    for path in sorted(files):
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        except (OSError, UnicodeDecodeError, EOFError):
            continue
        documents.extend(pieces(str(path), text))
    return documents


def changelogs() -> list[TextDocument]:
    """Debian's and the authors' changelogs."""
    return read_all(path for path in DOC.glob("*/change*") if path.is_file())


def manuals(english: bool) -> list[TextDocument]:
    """Manual pages in English, or in all the other languages."""
    folders = [
        path for path in MAN.glob("*") if path.is_dir() and (path.name in ENGLISH) == english
    ]
    return read_all(path for folder in folders for path in folder.rglob("*.gz") if path.is_file())


def perl() -> list[TextDocument]:
    """Perl's modules with their documentation."""
    return read_all(
        path for path in Path("/usr/share/perl").rglob("*.p[ml]") if not path.is_symlink()
    )


def headers(twin: bool) -> list[TextDocument]:
    """One of two halves of PyTorch's C++ headers, chosen by the hash of a file's name."""
    folder = texts.package_folder("torch/include")
    files = sorted(folder.rglob("*.h")) if folder else []
    named = {path: str(path.relative_to(folder)) for path in files} if folder else {}
    mine = [
        path
        for path, name in named.items()
        if (hashlib.sha256(name.encode()).digest()[0] % 2 == 1) == twin
    ]
    return texts.read_documents((named[path], path) for path in mine)


def records() -> list[TextDocument]:
    """File lists of installed packages: learnable paths and unlearnable SHA-256 sums."""
    documents: list[TextDocument] = []
    for dist in texts.packages():
        documents.extend(pieces(dist.metadata["Name"].lower(), dist.read_text("RECORD") or ""))
    return [part for document in documents for part in cut(document, 2048)]


def characters() -> list[TextDocument]:
    """The Unicode table behind Python's unicodedata: code point, letter, class, name."""
    lines = []
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        name = unicodedata.name(letter, "")
        if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")):
            lines.append(f"{code:05X} {letter} {unicodedata.category(letter)} {name}")
    return [
        TextDocument(f"{start:06d}", "\n".join(lines[start : start + 256]))
        for start in range(0, len(lines), 256)
    ]


def zones() -> list[TextDocument]:
    """Time-zone rules."""
    return [
        part for d in read_all([Path("/usr/share/zoneinfo/tzdata.zi")]) for part in cut(d, 1024)
    ]


def cut(document: TextDocument, size: int) -> Iterator[TextDocument]:
    """One document as several."""
    for start in range(0, len(document.text), size):
        yield TextDocument(f"{document.name}+{start:06d}", document.text[start : start + size])


def noise(size: int) -> list[TextDocument]:
    """Uniform hexadecimal digits: 4 bits a byte under any model."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    drawn = digits[np.random.default_rng(11).integers(0, 16, size)].tobytes().decode()
    return list(cut(TextDocument("noise", drawn), 4096))


def trivial(size: int) -> list[TextDocument]:
    """One repeated sentence with a random number that occurs three times."""
    random = np.random.default_rng(12)
    lines = (
        f"{n} comes, {n} stays, {n} goes.\n" for n in random.integers(10**7, 10**8, size // 41)
    )
    return list(cut(TextDocument("trivial", "".join(lines)), 4096))


def source(
    read: Callable[[], list[TextDocument]], about: str, megabytes: float = 4.0
) -> TextSource:
    """A source of at most `megabytes`."""
    return TextSource(read, int(megabytes * 1e6), about)


CORPORA.register(NAME)(
    CorpusRecipe(
        {
            "stdlib": source(texts.library_code, "modules of the standard library"),
            "tests": source(texts.library_tests, "tests of the standard library"),
            "reference": source(texts.language_reference, "the language reference behind help()"),
            "docstrings": source(
                texts.package_docstrings, "docstrings of torch, numpy and pydantic"
            ),
            "papers": source(texts.package_papers, "READMEs and licences of installed packages"),
            "headers": source(partial(headers, False), "half of PyTorch's C++ headers"),
            "headers-twin": source(partial(headers, True), "the other half"),
            "records": source(records, "lists of files with their SHA-256", 0.15),
            "characters": source(characters, "Python's table of Unicode"),
            "changelogs": source(changelogs, "Debian's changelogs"),
            "manuals": source(partial(manuals, True), "English manual pages"),
            "world": source(partial(manuals, False), "manual pages in other languages"),
            "perl": source(perl, "Perl's modules"),
            "zones": source(zones, "the rules of the world's clocks", 0.026),
            "noise": source(partial(noise, 1_000_000), "random hexadecimal digits"),
            "trivial": source(partial(trivial, 1_000_000), "one sentence over and over"),
        }
    )
)
DIAGNOSTIC = ("noise", "trivial", "headers-twin")
"""Sources that diagnose mixers."""


def corpus(folder: str | Path, say: Callable[[str], None] = print) -> CorpusPaths:
    """The benchmark's corpus in `folder`, built there if missing; its tokens are bytes."""
    return build_corpus(NAME, folder, say)
