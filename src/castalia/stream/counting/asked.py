"""What is counted: terms, matches of a pattern, pairs of either, or n-grams."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.stream.counting.pieces import Pieces
from castalia.stream.counting.terms import TermOptions, TextTerms, TokenTerms
from castalia.tokenizers.tokenizer import Tokenizer


class Findings(NamedTuple):
    """What was found in a block: N occurrences of some of the labels."""

    labels: list[str]
    label: NDArray[np.int64]
    """(N,) number of the label."""
    row: NDArray[np.int64]
    """(N,) row of the block."""


class Finder(Protocol):
    """Finds what is counted."""

    def __call__(self, pieces: Pieces) -> Findings:
        """The occurrences in the pieces of a block."""


@dataclass(frozen=True)
class Terms:
    """Listed terms."""

    terms: tuple[str, ...]
    options: TermOptions = field(default_factory=TermOptions)

    @property
    def ignore_case(self) -> bool:
        """Whether the text is read in lower case."""
        return self.options.ignore_case

    @property
    def fixed(self) -> list[str] | None:
        """The labels in the order in which they are reported, also those that never occur."""
        return list(self.terms)

    def described(self) -> dict[str, Any]:
        """What decides the counts, as JSON."""
        return {"terms": list(self.terms), **asdict(self.options)}

    def finder(self, tokenizer: Tokenizer) -> Finder:
        """What finds the terms.

        Raises  ConfigError as `TextTerms` and `TokenTerms`.
        """
        return TermFinder(self, tokenizer)


class TermFinder:
    """Finds listed terms."""

    def __init__(self, asked: Terms, tokenizer: Tokenizer) -> None:
        self.labels = list(asked.terms)
        self.by_ids = asked.options.as_tokens
        self.find: Any = (
            TokenTerms(self.labels, tokenizer)
            if self.by_ids
            else TextTerms(self.labels, asked.options)
        )

    def __call__(self, pieces: Pieces) -> Findings:
        """The occurrences in the pieces of a block."""
        found = self.find(pieces)
        rows_at = pieces.rows_at_ids if self.by_ids else pieces.rows_at
        return Findings(self.labels, found.term, rows_at(found.start))


def read_terms(path: str | Path) -> list[str]:
    """The terms of a file, one a line, as they stand there.

    Raises  DataError if it cannot be read; ConfigError if it has no term, an empty line or a term
            twice, or a term that is no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--terms {path}: cannot be read as text: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    require_terms(lines, str(path))
    return lines


def require_terms(terms: list[str], where: str) -> None:
    """Raises  ConfigError if there is no term, or one is empty, double, or no text."""
    if not terms:
        raise ConfigError(f"{where}: no terms; write one a line")
    seen: dict[str, int] = {}
    for line, term in enumerate(terms, 1):
        if not term.strip():
            raise ConfigError(f"{where}:{line}: an empty term; write one term a line")
        if "\N{REPLACEMENT CHARACTER}" in term:
            raise ConfigError(f"{where}:{line}: {term!r} has U+FFFD, which stands for broken text")
        if term in seen:
            raise ConfigError(f"{where}:{line}: {term!r} stands in line {seen[term]} already")
        seen[term] = line


def asked_hash(described: dict[str, Any]) -> str:
    """16 hex digits that name what is counted and how."""
    text = json.dumps(described, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
