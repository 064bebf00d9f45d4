"""n-grams of tokens or words: exact, through sorted parts on disk that are merged range by range.

A run has too many n-grams for one dictionary. Each part of some steps is sorted and its equal
n-grams are added up; then all parts are merged in ranges of keys that fit in memory.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.stream.counting.pairs import WORD
from castalia.stream.counting.pieces import Pieces
from castalia.tokenizers.tokenizer import Tokenizer

WORDS_AT_ONCE = 1 << 21
"""Words whose hashes are remembered."""
Keys = NDArray[Any]
"""(M, columns) uint64: n-grams that sort by their columns."""


@dataclass(frozen=True)
class Ngrams:
    """Every n-gram of tokens, or of words: runs of word characters."""

    n: int
    words: bool = False
    ignore_case: bool = False

    @property
    def lower_text(self) -> bool:
        """Whether the text is read in lower case."""
        return self.ignore_case

    def described(self) -> dict[str, Any]:
        """What decides the counts, as JSON."""
        return {"ngrams": self.n, "words": self.words, "ignore_case": self.ignore_case}

    def check(self) -> None:
        """Raises  ConfigError if no text has such n-grams."""
        if self.n < 1:
            raise ConfigError(f"--ngrams {self.n}: expected at least 1")
        if self.ignore_case and not self.words:
            raise ConfigError("--ignore-case needs --words: tokens have a case of their own")


class Cutter:
    """Cuts pieces into n-grams as sorting keys."""

    def __init__(self, asked: Ngrams, tokenizer: Tokenizer) -> None:
        self.n = asked.n
        self.by_words = asked.words
        if asked.words:
            self.bits = 64
        else:
            self.bits = max(1, tokenizer.vocab_size.bit_length())
        self.hashes: dict[str, int] = {}
        self.names: dict[int, str] = {}
        """Words of this part by their hash."""

    def __call__(self, pieces: Pieces) -> Keys:
        """The n-grams within each piece, unsorted."""
        if not self.by_words:
            return self.packed(pieces.ids, pieces.separator)
        numbers = [0]
        for _, text in pieces.texts():
            numbers += map(self.hash_of, WORD.findall(text))
            # 0 is the hash of no word: it separates pieces.
            numbers.append(0)
        return self.packed(np.array(numbers, np.uint64), 0)

    def packed(self, numbers: NDArray[Any], separator: int) -> Keys:
        """The n-grams of separated numbers: those with a separator in them are left out."""
        if len(numbers) < self.n:
            return pack(np.empty((0, self.n), np.uint64), self.bits)
        windows = sliding_window_view(numbers, self.n)
        ends = np.cumsum(numbers == separator)
        before = np.concatenate(([0], ends))[: len(windows)]
        return pack(windows[ends[self.n - 1 :] == before], self.bits)

    def hash_of(self, word: str) -> int:
        """64 bits of a word's hash, never 0: of 100 million words, two are alike by chance once in
        3,000 runs."""
        number = self.hashes.get(word)
        if number is None:
            if len(self.hashes) >= WORDS_AT_ONCE:
                self.hashes.clear()
            digest = hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest()
            number = int.from_bytes(digest) or 1
            self.hashes[word] = number
        self.names[number] = word
        return number

    def new_part(self) -> None:
        """Forget the words of the last part."""
        self.names = {}


def pack(windows: NDArray[Any], bits: int) -> Keys:
    """n-grams of numbers of so many bits, (M, n), as keys: several numbers share an integer."""
    each = 64 // bits
    columns = []
    for begin in range(0, windows.shape[1], each):
        column = np.zeros(len(windows), np.uint64)
        for place, number in enumerate(windows[:, begin : begin + each].T):
            # The first is not shifted: with 64 bits the shift would be undefined.
            if place:
                column = column << np.uint64(bits)
            column |= number.astype(np.uint64)
        columns.append(column)
    return np.stack(columns, 1)


def unpack(keys: Keys, n: int, bits: int) -> NDArray[np.uint64]:
    """The numbers of packed keys, (M, n)."""
    each = 64 // bits
    mask = np.uint64((1 << bits) - 1)
    numbers = []
    for place in range(n):
        column, within = divmod(place, each)
        behind = min(each, n - column * each) - 1 - within
        numbers.append((keys[:, column] >> np.uint64(behind * bits)) & mask)
    return np.stack(numbers, 1)


def added_up(keys: Keys, counts: NDArray[np.int64] | None = None) -> tuple[Keys, NDArray[np.int64]]:
    """Sorted distinct keys and the sum of the counts of each; without counts each key is one."""
    if not len(keys):
        return keys, np.empty(0, np.int64)
    if counts is None and keys.shape[1] == 1:
        ordered = np.sort(keys[:, 0])[:, None]
    else:
        order = np.lexsort(keys.T[::-1])
        ordered = keys[order]
    new = np.ones(len(keys), np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    starts = np.flatnonzero(new)
    if counts is None:
        return ordered[starts], np.diff(starts, append=len(keys))
    return ordered[starts], np.add.reduceat(counts[order], starts)
