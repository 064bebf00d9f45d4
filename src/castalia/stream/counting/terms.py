"""Occurrences of listed terms: whole words by their bytes, other terms by an automaton."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.stream.counting.pieces import Pieces, word_bytes
from castalia.tokenizers.tokenizer import Tokenizer

WORD_BYTES = 16
"""Longest term, in bytes, that is looked up as two integers of 64 bits."""
SIEVE_BITS = 16
"""Most words of a text are no term: a table of this many bits of a hash says so at once."""
MIXER = np.uint64(0x9E3779B97F4A7C15)
"""Odd constant of Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4)."""
MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
"""The first `size` bytes of a little-endian integer."""


class Found(NamedTuple):
    """Occurrences: which term, and where."""

    term: NDArray[np.int64]
    """Number of the term."""
    start: NDArray[np.int64]
    """Place of its first byte in the text of the pieces, or of its first id in their ids."""
    stop: NDArray[np.int64]
    """One past its last."""


@dataclass(frozen=True)
class TermOptions:
    """How listed terms are found."""

    substring: bool = False
    """Also inside words."""
    ignore_case: bool = False
    as_tokens: bool = False
    """By the ids of each term, not by text."""


class TextTerms:
    """Finds terms in text: all occurrences, overlapping ones too.

    Without `substring` a term that begins or ends with a word character must begin or end a word.
    Raises  ConfigError if a term needs the automaton and it is not installed.
    """

    def __init__(self, terms: list[str], options: TermOptions) -> None:
        self.whole = not options.substring
        spelled = [term.lower() if options.ignore_case else term for term in terms]
        numbers = range(len(terms))
        short = [n for n in numbers if self.whole and is_short_word(spelled[n])]
        self.words = None
        if short:
            self.words = Words([spelled[n].encode() for n in short], short)
        rest = sorted(set(numbers) - set(short))
        self.automaton: Any = None
        if rest:
            library = require("ahocorasick_rs", "count", "counting terms that are not single words")
            self.automaton = library.BytesAhoCorasick([spelled[n].encode() for n in rest])
            self.numbers = np.array(rest, np.int64)
            self.begins = np.array([self.whole and is_word(spelled[n][0]) for n in rest])
            self.ends = np.array([self.whole and is_word(spelled[n][-1]) for n in rest])

    def __call__(self, pieces: Pieces) -> Found:
        """The occurrences in the text of some pieces, in no order."""
        text = np.frombuffer(pieces.text, np.uint8)
        if self.whole:
            word = word_bytes(text)
        else:
            word = np.empty(0, np.bool_)
        parts = []
        if self.words is not None:
            parts.append(self.words.find(text, word))
        if self.automaton is not None:
            parts.append(self.by_automaton(pieces.text, word))
        return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def by_automaton(self, text: bytes, word: NDArray[np.bool_]) -> Found:
        """Occurrences of the terms that are no short words."""
        matches = self.automaton.find_matches_as_indexes(text, overlapping=True)
        table = np.array(matches, np.int64).reshape(-1, 3)
        term, start, stop = table.T
        if self.whole:
            # A separator before the first piece and behind each: no place lies outside.
            inside = self.begins[term] & word[start - 1]
            inside |= self.ends[term] & word[stop]
            term, start, stop = table[~inside].T
        return Found(self.numbers[term], start, stop)


class Words:
    """Terms that are single words of at most WORD_BYTES bytes.

    A word's bytes are read as two integers of 64 bits, so that a comparison of integers is one of
    words, and numpy looks up a million of them at once.
    """

    def __init__(self, words: list[bytes], numbers: list[int]) -> None:
        padded = b"".join(word.ljust(WORD_BYTES, b"\0") for word in words)
        keys = np.frombuffer(padded, "<u8").reshape(-1, 2)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        self.low = keys[order, 0]
        self.high = keys[order, 1]
        self.numbers = np.array(numbers, np.int64)[order]
        self.longest = max(len(word) for word in words)
        # The same first 8 bytes begin as many terms as this at most.
        self.alike = int(np.unique(self.low, return_counts=True)[1].max())
        self.sieve = np.zeros(1 << SIEVE_BITS, np.bool_)
        self.sieve[sieve_place(self.low)] = True

    def find(self, text: NDArray[np.uint8], word: NDArray[np.bool_]) -> Found:
        """The words of a text that are terms."""
        edges = np.flatnonzero(word[1:] != word[:-1]) + 1
        start = edges[0::2]
        stop = edges[1::2]
        fits = stop - start <= self.longest
        start = start[fits]
        stop = stop[fits]
        # 8 bytes from every place: a view whose items overlap.
        eights = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
        size = stop - start
        low = eights[start] & MASKS[np.minimum(size, 8)]
        likely = self.sieve[sieve_place(low)]
        start, stop, size, low = start[likely], stop[likely], size[likely], low[likely]
        high = eights[start + 8] & MASKS[np.maximum(size - 8, 0)]
        first = np.searchsorted(self.low, low)
        parts = []
        for ahead in range(self.alike):
            place = np.minimum(first + ahead, len(self.low) - 1)
            same = (self.low[place] == low) & (self.high[place] == high)
            if ahead:
                same &= first + ahead < len(self.low)
            parts.append(Found(self.numbers[place[same]], start[same], stop[same]))
        return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def sieve_place(low: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Place in the sieve of a word, by its first 8 bytes."""
    return np.multiply(low, MIXER) >> np.uint64(64 - SIEVE_BITS)


class TokenTerms:
    """Finds terms as sequences of ids, by one walk of all places down a tree of the terms.

    Raises  ConfigError if a term has no ids, or two terms have the same.
    """

    def __init__(self, terms: list[str], tokenizer: Tokenizer) -> None:
        self.base = tokenizer.vocab_size + 1
        self.ends: dict[int, int] = {}
        edges: dict[int, int] = {}
        owners: dict[int, str] = {}
        self.longest = 0
        for number, term in enumerate(terms):
            ids = tokenizer.encode(term)
            if not ids:
                raise ConfigError(f"the term {term!r} has no tokens in {tokenizer.where}")
            node = 0
            for i in ids:
                # Node 0 is the root; a new node gets the next number.
                node = edges.setdefault(node * self.base + i, len(edges) + 1)
            if node in owners:
                raise ConfigError(f"the terms {owners[node]!r} and {term!r} have the same tokens")
            owners[node] = term
            self.ends[node] = number
            self.longest = max(self.longest, len(ids))
        self.keys = np.array(sorted(edges), np.int64)
        self.nodes = np.array([edges[key] for key in self.keys.tolist()], np.int64)
        self.term_of = np.full(len(edges) + 1, -1, np.int64)
        self.term_of[list(self.ends)] = list(self.ends.values())

    def __call__(self, pieces: Pieces) -> Found:
        """The occurrences in the ids of some pieces; a separator ends every walk."""
        ids = pieces.ids
        start = np.arange(len(ids))
        node = np.zeros(len(ids), np.int64)
        parts = []
        for depth in range(self.longest):
            inside = start + depth < len(ids)
            start = start[inside]
            # A separator is an id that no term has, so that no walk goes on behind it.
            key = node[inside] * self.base + ids[start + depth]
            place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
            goes_on = self.keys[place] == key
            start = start[goes_on]
            node = self.nodes[place[goes_on]]
            ended = self.term_of[node] >= 0
            parts.append(Found(self.term_of[node[ended]], start[ended], start[ended] + depth + 1))
        return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def is_word(character: str) -> bool:
    r"""Whether a character is one of a word, as `\w` has it."""
    return character.isalnum() or character == "_"


def is_short_word(term: str) -> bool:
    """Whether a term is one word of at most WORD_BYTES bytes."""
    return len(term.encode()) <= WORD_BYTES and all(map(is_word, term))
