"""What is counted: terms, matches of a pattern, pairs of either, or n-grams."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.stream.counting.matches import ROW_SECONDS, Pattern
from castalia.stream.counting.pairs import pair_labels, placed_in_texts, placed_terms
from castalia.stream.counting.pieces import Pieces
from castalia.stream.counting.terms import Found, TermOptions, TextTerms, TokenTerms
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
    def lower_text(self) -> bool:
        """Whether the text is read in lower case."""
        return self.options.ignore_case

    @property
    def fixed(self) -> list[str]:
        """The labels that are reported in this order, also if they never occur."""
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
        self.find: Callable[[Pieces], Found]
        if self.by_ids:
            self.find = TokenTerms(self.labels, tokenizer)
        else:
            self.find = TextTerms(self.labels, asked.options)

    def __call__(self, pieces: Pieces) -> Findings:
        """The occurrences in the pieces of a block."""
        found = self.find(pieces)
        rows_at = pieces.rows_at
        if self.by_ids:
            rows_at = pieces.rows_at_ids
        return Findings(self.labels, found.term, rows_at(found.start))


@dataclass(frozen=True)
class Matches:
    """Matches of a pattern, by their text."""

    pattern: str
    ignore_case: bool = False
    seconds: float = ROW_SECONDS
    """Time limit of a row."""

    lower_text = False
    fixed: ClassVar[list[str]] = []

    def described(self) -> dict[str, Any]:
        """What decides the counts, as JSON."""
        return {"regex": self.pattern, "ignore_case": self.ignore_case}

    def finder(self, tokenizer: Tokenizer) -> Finder:
        """What finds the matches.

        Raises  ConfigError if the pattern does not compile.
        """
        return MatchFinder(Pattern(self.pattern, self.ignore_case, self.seconds))


class MatchFinder:
    """Finds the matches of a pattern."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def __call__(self, pieces: Pieces) -> Findings:
        """The occurrences in the pieces of a block."""
        numbers: dict[str, int] = {}
        label = []
        rows = []
        for row, _, matches in self.pattern.in_pieces(pieces):
            # Numbered as they come; the parts are joined by the labels' names.
            label += [numbers.setdefault(match.label, len(numbers)) for match in matches]
            rows += [row] * len(matches)
        return Findings(list(numbers), np.array(label, np.int64), np.array(rows, np.int64))


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of terms or of matches with `least` to `within` words between them."""

    of: Terms | Matches
    within: int
    least: int = 0

    fixed: ClassVar[list[str]] = []

    @property
    def lower_text(self) -> bool:
        """Whether the text is read in lower case."""
        return self.of.lower_text

    def described(self) -> dict[str, Any]:
        """What decides the counts, as JSON."""
        return {"pairs_within": self.within, "least": self.least, **self.of.described()}

    def finder(self, tokenizer: Tokenizer) -> Finder:
        """What finds the pairs.

        Raises  ConfigError as that of the terms or matches.
        """
        if isinstance(self.of, Matches):
            pattern = Pattern(self.of.pattern, self.of.ignore_case, self.of.seconds)
            return MatchPairFinder(pattern, self)
        # Ids have no words between them.
        if self.of.options.as_tokens:
            raise ConfigError("--pairs-within counts words between terms: without --as-tokens")
        return TermPairFinder(self.of, self)


class TermPairFinder:
    """Finds pairs of listed terms."""

    def __init__(self, terms: Terms, asked: Pairs) -> None:
        self.names = list(terms.terms)
        self.find = TextTerms(self.names, terms.options)
        self.asked = asked

    def __call__(self, pieces: Pieces) -> Findings:
        """The occurrences in the pieces of a block."""
        placed = placed_terms(pieces, self.find(pieces))
        one, other, piece = placed.pairs(self.asked.within, self.asked.least)
        labels, number = pair_labels(one, other, self.names)
        return Findings(labels, number, pieces.row[piece])


class MatchPairFinder:
    """Finds pairs of matches of a pattern."""

    def __init__(self, pattern: Pattern, asked: Pairs) -> None:
        self.pattern = pattern
        self.asked = asked

    def __call__(self, pieces: Pieces) -> Findings:
        """The occurrences in the pieces of a block."""
        numbers: dict[str, int] = {}
        texts = []
        for _, text, matches in self.pattern.in_pieces(pieces):
            found = [
                (numbers.setdefault(match.label, len(numbers)), match.start, match.stop)
                for match in matches
            ]
            texts.append((text, found))
        one, other, piece = placed_in_texts(texts).pairs(self.asked.within, self.asked.least)
        labels, number = pair_labels(one, other, list(numbers))
        return Findings(labels, number, pieces.row[piece])


Asked = Terms | Matches | Pairs


def read_terms(path: str | Path) -> list[str]:
    """The terms of a file, one a line, as they stand there.

    Raises  DataError if it cannot be read; ConfigError if it has no term, an empty line or a term
            twice, or a term that is no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--terms {path}: cannot be read as text: {error}") from None
    lines = []
    if text.strip():
        lines = text.removesuffix("\n").split("\n")
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
