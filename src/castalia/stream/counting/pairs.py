"""Pairs: two terms, or two matches of a pattern, with few words between them."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castalia.stream.counting.pieces import Pieces, word_bytes
from castalia.stream.counting.terms import Found

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Placed:
    """N occurrences, by their places among the words of all pieces, in the order of their starts.

    Words are runs of word characters, numbered from 1 over all pieces. An occurrence without a word
    character has the number of the word before it.
    """

    label: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first_word: NDArray[np.int64]
    last_word: NDArray[np.int64]
    piece: NDArray[np.int64]

    def pairs(
        self, within: int, least: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Two labels and the piece of every two occurrences with `least` to `within` words
        between."""
        left = []
        right = []
        piece = []
        count = len(self.label)
        for ahead in range(1, count):
            a = slice(0, count - ahead)
            b = slice(ahead, count)
            between = self.first_word[b] - self.last_word[a] - 1
            near = between <= within
            near &= self.piece[a] == self.piece[b]
            # Words only grow with the place, so that no later one is nearer.
            if not near.any():
                break
            near &= (self.start[b] >= self.stop[a]) & (np.maximum(between, 0) >= least)
            left.append(self.label[a][near])
            right.append(self.label[b][near])
            piece.append(self.piece[a][near])
        none = [np.empty(0, np.int64)]
        one, other, where = (np.concatenate(parts or none) for parts in (left, right, piece))
        return one, other, where


def placed_terms(pieces: Pieces, found: Found) -> Placed:
    """Occurrences of terms in the text of pieces, with their words."""
    order = np.argsort(found.start, kind="stable")
    label, start, stop = (column[order] for column in found)
    word = word_bytes(np.frombuffer(pieces.text, np.uint8))
    begins = np.flatnonzero(word[1:] & ~word[:-1]) + 1
    return Placed(
        label,
        start,
        stop,
        np.searchsorted(begins, start, side="right"),
        np.searchsorted(begins, stop - 1, side="right"),
        np.searchsorted(pieces.stops, start),
    )


def placed_in_texts(texts: list[tuple[str, list[tuple[int, int, int]]]]) -> Placed:
    """Occurrences (label, start, stop) in the texts of pieces, with their words."""
    columns: list[NDArray[np.int64]] = [np.empty((0, 6), np.int64)]
    for piece, (text, found) in enumerate(texts):
        if len(found) < 2:
            # No pair, and a text without one is not cut into words.
            continue
        begins = np.array([match.start() for match in WORD.finditer(text)], np.int64)
        label, start, stop = np.array(sorted(found, key=lambda each: each[1]), np.int64).T
        first = np.searchsorted(begins, start, side="right")
        last = np.searchsorted(begins, np.maximum(stop - 1, start), side="right")
        columns.append(np.stack([label, start, stop, first, last, np.full_like(label, piece)], 1))
    return Placed(*np.concatenate(columns).T)


def pair_label(one: str, other: str) -> str:
    """The name of an unordered pair, `7-12`: numbers by their size, before other words."""
    first, second = sorted((one, other), key=label_order)
    return f"{first}-{second}"


def label_order(label: str) -> tuple[bool, int, str]:
    """Where a label stands in a pair."""
    is_number = label.isascii() and label.isdigit()
    return not is_number, int(label) if is_number else 0, label


def pair_labels(
    one: NDArray[np.int64], other: NDArray[np.int64], names: list[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """The names of the pairs that occur, and the number of each pair's."""
    code = np.minimum(one, other) * len(names) + np.maximum(one, other)
    distinct, number = np.unique(code, return_inverse=True)
    made = [pair_label(names[c // len(names)], names[c % len(names)]) for c in distinct.tolist()]
    return made, number
