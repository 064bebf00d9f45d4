"""Interventions that replace what stands in the text of a document, or its ids: swap, regex and
function."""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.data.intervention_config import FunctionConfig, RegexConfig, SwapConfig, Term
from castalia.interventions.intervention import Facts, Notes, PieceIntervention
from castalia.interventions.rewriting import (
    ESCAPED,
    Replacement,
    Rewriter,
    TokenEdit,
    difference,
    surrogates,
)
from castalia.tokenizers.tokenizer import Tokenizer

CHECKED_CALLS = 4
"""First changes of a process for which a function is called twice, to see whether it is one."""


OUTSIDE = "".join(map(chr, range(ord(ESCAPED[0]), ord(ESCAPED[1]) + 1)))
"""Every character that stands for a byte outside of any character."""


class TextIntervention(PieceIntervention):
    """One that replaces parts of texts."""

    rewriter: Rewriter

    @abstractmethod
    def replacements(self, text: str, notes: Notes) -> list[Replacement]:
        """What changes in a text, ascending."""

    def edits(self, tokens: NDArray[np.int64], notes: Notes) -> list[TokenEdit]:
        """The edits of one document, text by text between special tokens."""
        found = []
        for part in self.rewriter.texts_in(tokens):
            own = tokens[part.start : part.stop]
            text = self.rewriter.text(own)
            replacements = self.replacements(text, notes)
            if not replacements:
                continue
            edits, left_out = self.rewriter.rewritten(own, text, replacements)
            notes.left_out += left_out
            for edit in edits:
                start, stop = (part.start + place for place in (edit.start, edit.stop))
                found.append(edit._replace(start=start, stop=stop))
        return found


class Swap(TextIntervention):
    """Whole words by others, in the case of the word that was there."""

    def __init__(self, config: SwapConfig, *args: Any, rewriter: Rewriter) -> None:
        super().__init__(config, *args)
        self.rewriter = rewriter
        self.match_case = config.match_case
        terms = [(str(old), str(new)) for old, new in config.directions]
        self.new = {old if self.match_case else old.lower(): new for old, new in terms}
        # The longest first: of `he` and `he said` the longer one is meant where both stand.
        words = sorted(self.new, key=len, reverse=True)
        flags = re.NOFLAG if self.match_case else re.IGNORECASE
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", flags)

    def replacements(self, text: str, notes: Notes) -> list[Replacement]:
        """Every term that stands in the text."""
        found = []
        for match in self.pattern.finditer(text):
            word = match[0]
            if self.match_case:
                new = self.new[word]
            else:
                new = in_case(self.new[word.lower()], word)
            if new != word:
                found.append(Replacement(match.start(), match.end(), new))
        return found


def in_case(new: str, word: str) -> str:
    """`new` in the case of `word`: SHE for HE, She for He, as it is for he."""
    if len(word) > 1 and word.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if word[:1].isupper() else new


class Regex(TextIntervention):
    """Whatever a regular expression matches."""

    def __init__(self, config: RegexConfig, *args: Any, rewriter: Rewriter) -> None:
        super().__init__(config, *args)
        self.rewriter = rewriter
        self.replacement = config.replacement
        self.pattern = re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)
        try:
            # The groups that it names are those of the pattern.
            re.compile(f"{config.pattern}|").sub(self.replacement, "")
        except (re.error, IndexError) as error:
            raise ConfigError(
                f"{self.where}: replacement {self.replacement!r} does not suit pattern"
                f" {config.pattern!r}: {error}"
            ) from None

    def replacements(self, text: str, notes: Notes) -> list[Replacement]:
        """Every match that its replacement differs from."""
        found = []
        for match in self.pattern.finditer(text):
            new = match.expand(self.replacement)
            if new != match[0]:
                found.append(Replacement(match.start(), match.end(), new))
        return found


class TextFunction(TextIntervention):
    """A user's function of texts."""

    def __init__(
        self, config: FunctionConfig, *args: Any, rewriter: Rewriter, function: Callable[..., Any]
    ) -> None:
        super().__init__(config, *args)
        self.rewriter = rewriter
        self.name = config.function
        self.function = function
        self.checked = 0

    def replacements(self, text: str, notes: Notes) -> list[Replacement]:
        """The part of the text in which the function's differs."""
        # A row may cut the first and the last character; a function gets whole ones.
        inner = text.strip(OUTSIDE)
        if surrogates(inner) or not inner:
            return []
        new = self.function(inner)
        if not isinstance(new, str):
            raise DataError(f"{self.where}: {self.name} must return a text, got {new!r:.80}")
        begin = text.index(inner)
        changes = difference(inner, new)
        if changes and self.checked < CHECKED_CALLS:
            self.checked += 1
            if self.function(inner) != new:
                raise DataError(unsteady(self.where, self.name))
        return [Replacement(begin + s, begin + e, words) for s, e, words in changes]


class TokenFunction(PieceIntervention):
    """A user's function of ids."""

    def __init__(
        self, config: FunctionConfig, *args: Any, vocab_size: int, function: Callable[..., Any]
    ) -> None:
        super().__init__(config, *args)
        self.name = config.function
        self.function = function
        self.vocab_size = vocab_size
        self.checked = 0

    def edits(self, tokens: NDArray[np.int64], notes: Notes) -> list[TokenEdit]:
        """The part of the tokens in which the function's differ."""
        new = self.called(tokens)
        if np.array_equal(new, tokens):
            return []
        if self.checked < CHECKED_CALLS:
            self.checked += 1
            if not np.array_equal(self.called(tokens), new):
                raise DataError(unsteady(self.where, self.name))
        shorter = min(len(new), len(tokens))
        different = np.flatnonzero(new[:shorter] != tokens[:shorter])
        start = shorter
        if len(different):
            start = int(different[0])
        most = shorter - start
        ends = new[len(new) - most :] != tokens[len(tokens) - most :]
        tail = most
        if ends.any():
            tail = most - 1 - int(np.flatnonzero(ends)[-1])
        return [token_edit(tokens, start, len(tokens) - tail, new[start : len(new) - tail])]

    def called(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the function makes of tokens.

        Raises  DataError if these are no ids of the model.
        """
        # A copy: a function that writes into its argument must not change what it is compared to.
        new = np.asarray(self.function(tokens.copy()))
        if new.ndim != 1 or not (new.dtype.kind in "iu" or not len(new)):
            raise DataError(
                f"{self.where}: {self.name} must return ids in one dimension, got an array of"
                f" {new.dtype} of shape {new.shape}"
            )
        if len(new) and not 0 <= new.min() <= new.max() < self.vocab_size:
            raise DataError(
                f"{self.where}: {self.name} must return ids below {self.vocab_size}, got"
                f" {new.min()} to {new.max()}"
            )
        return new.astype(np.int64)


def unsteady(where: str, name: str) -> str:
    """The error about a function that is none."""
    return (
        f"{where}: {name} gave two results for one document; it must give the same for the same, so"
        " that a resume and every worker see the same rows"
    )


class SwapTokens(PieceIntervention):
    """Ids by ids, wherever they stand."""

    def __init__(self, config: SwapConfig, *args: Any, mapping: Mapping[int, int]) -> None:
        super().__init__(config, *args)
        self.mapping = mapping
        self.old = np.array(sorted(mapping), np.int64)
        self.new = np.array([mapping[token] for token in sorted(mapping)], np.int64)

    def edits(self, tokens: NDArray[np.int64], notes: Notes) -> list[TokenEdit]:
        """One edit for each token."""
        found = np.minimum(np.searchsorted(self.old, tokens), len(self.old) - 1)
        places = np.flatnonzero((self.old[found] == tokens) & (self.new[found] != tokens))
        new = self.new[found]
        return [
            token_edit(tokens, place, place + 1, new[place : place + 1])
            for place in places.tolist()
        ]


def token_edit(
    tokens: NDArray[np.int64], start: int, stop: int, ids: NDArray[np.int64]
) -> TokenEdit:
    """An edit of ids, which shows them in place of text."""
    old, new = (" ".join(map(str, part.tolist())) for part in (tokens[start:stop], ids))
    return TokenEdit(start, stop, ids, old, new)


def id_mapping(
    terms: Sequence[tuple[Term, Term]], tokenizer: Tokenizer | None, facts: Facts, where: str
) -> dict[int, int]:
    """Pairs of ids, or of the texts of single tokens, as ids.

    Raises  ConfigError for a text that is not one token, and an id that the model lacks.
    """
    mapping: dict[int, int] = {}
    for pair in terms:
        old, new = (token_id(term, tokenizer, facts.vocab_size, where) for term in pair)
        if mapping.setdefault(old, new) != new:
            raise ConfigError(
                f"{where}: terms: id {old} would become both {mapping[old]} and {new}"
            )
    return mapping


def token_id(term: Term, tokenizer: Tokenizer | None, vocab_size: int, where: str) -> int:
    """The id of a term: an id, the name of a token, or a text that is one token.

    Raises  ConfigError if there is none.
    """
    if isinstance(term, str):
        if tokenizer is None:
            raise ConfigError(f"{where}: {term!r} is text, and data.tokenizer is null; give an id")
        named = tokenizer.ids.get(term)
        # The name of a special token is not what its text encodes to.
        ids = tokenizer.encode(term) if named is None else [named]
        if len(ids) != 1:
            raise ConfigError(
                f"{where}: {term!r} is {len(ids)} tokens of {tokenizer.where}, not one; use"
                " level: text, or ids"
            )
        term = ids[0]
    if term >= vocab_size:
        raise ConfigError(f"{where}: id {term} is none of the model's {vocab_size}")
    return term
