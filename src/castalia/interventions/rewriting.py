"""Replacements in the text of tokens, carried over to the tokens: what no replacement touches stays
bit-equal."""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.tokenizers.token_texts import TokenTexts
from castalia.tokenizers.tokenizer import BYTES, Tokenizer

ESCAPED = ("\udc80", "\udcff")
"""First and last character that stands for a byte outside of any character."""
STAND_IN = "\N{REPLACEMENT CHARACTER}"
"""What the tokenizer reads in their place; no token of it is used."""
CUT = "at a character that the row cuts in two"
ALTERED = "where the tokenizer does not give its text back"


class Replacement(NamedTuple):
    """Characters [start, stop) of a text, replaced by `new`."""

    start: int
    stop: int
    new: str


class TokenEdit(NamedTuple):
    """Tokens [start, stop) of a sequence, replaced by `ids`."""

    start: int
    stop: int
    ids: NDArray[np.int64]
    old_text: str = ""
    new_text: str = ""

    @property
    def growth(self) -> int:
        """How many tokens more there are."""
        return len(self.ids) - (self.stop - self.start)


class Rewritten(NamedTuple):
    """The edits of tokens that replacements of text come to, and why others do not."""

    edits: list[TokenEdit]
    left_out: list[str]


class Encoded(NamedTuple):
    """A text as tokens, with the places where the tokenizer begins anew."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    """(n + 1,) bytes before each token, and at last all."""
    words: NDArray[np.int64]
    """Bytes at which a word of the tokenizer begins, ascending, and at last all."""


class Rewriter:
    """Texts of tokens and back, for one tokenizer.

    Only tokens that overlap a replacement are encoded again, with the words of the tokenizer (its
    pre-tokens) that they belong to, so that the new ids are those of the whole new text.

    Raises  ConfigError if the tokenizer has no such words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        splits = tokenizer.kind == BYTES or tokenizer.inner.pre_tokenizer is not None
        if not splits or tokenizer.kind not in ("json", BYTES):
            raise ConfigError(
                f"interventions on text: {tokenizer.where} does not cut texts into words before it"
                " makes tokens, so that a change of one word may alter every other token; use"
                " level: tokens"
            )

    def __getstate__(self) -> dict[str, Tokenizer]:
        return {"tokenizer": self.tokenizer}

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""
        texts = TokenTexts(self.tokenizer)
        return [texts.bytes_of(token) for token in range(self.tokenizer.vocab_size)]

    @cached_property
    def special(self) -> NDArray[np.bool_]:
        """Whether a token is a special one, which belongs to no text."""
        special = np.zeros(self.tokenizer.vocab_size, np.bool_)
        for token, added in self.tokenizer.inner.get_added_tokens_decoder().items():
            special[token] = added.special
        return special

    def texts_in(self, tokens: NDArray[np.int64]) -> list[range]:
        """The runs of tokens between special ones, non-empty."""
        # Ids of a padded vocabulary belong to no text either.
        known = np.minimum(tokens, len(self.special) - 1)
        stops = np.flatnonzero(self.special[known] | (tokens != known)).tolist()
        edges = [-1, *stops, len(tokens)]
        pairs = itertools.pairwise(edges)
        return [range(one + 1, other) for one, other in pairs if one + 1 < other]

    def text(self, tokens: NDArray[np.int64]) -> str:
        """The text of tokens; bytes outside of characters become lone surrogates."""
        pieces = self.pieces
        raw = b"".join([pieces[token] for token in tokens.tolist()])
        return raw.decode("utf-8", "surrogateescape")

    def encode(self, text: str) -> Encoded | None:
        """A text as tokens with its words; None if the tokens do not give the text back."""
        raw = text.encode()
        if self.tokenizer.kind == BYTES:
            ids = np.frombuffer(raw, np.uint8).astype(np.int64)
            starts = np.arange(len(raw) + 1)
            # A byte of the form 10xxxxxx goes on with a character.
            begins = np.flatnonzero((ids & 0xC0) != 0x80)
            return Encoded(ids, starts, np.append(begins, len(raw)))
        encoding = self.tokenizer.inner.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        pieces = [self.pieces[token] for token in encoding.ids]
        # A normalizer may write characters otherwise; then no place in the text is known.
        if b"".join(pieces) != raw:
            return None
        starts = np.cumsum([0, *map(len, pieces)])
        words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
        first = np.flatnonzero((np.diff(words, prepend=-2) != 0) | (words < 0))
        return Encoded(ids, starts, np.append(starts[first], len(raw)))

    def rewritten(
        self, tokens: NDArray[np.int64], text: str, replacements: Sequence[Replacement]
    ) -> Rewritten:
        """The edits of the tokens (n,) of a text; replacements ascend and do not overlap."""
        if not replacements:
            return Rewritten([], [])
        new_text = without_surrogates(replaced(text, replacements))
        encoded = self.encode(new_text)
        if encoded is None:
            return Rewritten([], [ALTERED] * len(replacements))
        lengths = [len(self.pieces[token]) for token in tokens.tolist()]
        old_starts = np.cumsum([0, *lengths])
        edits: list[TokenEdit] = []
        left_out: list[str] = []
        for window in windows(Edges.of(old_starts, text, encoded, new_text, replacements)):
            old_text = text[window.old.start : window.old.stop]
            if surrogates(old_text):
                left_out.append(CUT)
                continue
            first, stop = np.searchsorted(encoded.starts, window.new_bytes).tolist()
            ids = encoded.ids[first:stop]
            start, end = window.tokens
            if not np.array_equal(ids, tokens[start:end]):
                changed = b"".join([self.pieces[token] for token in ids.tolist()])
                edits.append(TokenEdit(start, end, ids, old_text, changed.decode()))
        return Rewritten(edits, left_out)


class Window(NamedTuple):
    """Neighbouring words that are encoded again."""

    tokens: tuple[int, int]
    """The first old token, and one past the last."""
    old: range
    """Their characters in the old text."""
    new_bytes: tuple[int, int]
    """Where they begin and end in the new text, in bytes."""


class Edges(NamedTuple):
    """The places at which a window may begin or end: old tokens begin there, and new words."""

    chars: NDArray[np.int64]
    """(m,) places in the old text, ascending."""
    tokens: NDArray[np.int64]
    """(m,) the old token that begins there."""
    begins: NDArray[np.int64]
    """(m,) the byte of the new text if a window begins there; -1 if none may."""
    ends: NDArray[np.int64]
    """(m,) the same for the end of a window. It differs where text is put between characters."""
    replacements: Sequence[Replacement]

    @classmethod
    def of(
        cls,
        old_starts: NDArray[np.int64],
        text: str,
        encoded: Encoded,
        new_text: str,
        replacements: Sequence[Replacement],
    ) -> "Edges":
        """The edges of an old text, whose tokens begin at the bytes `old_starts`, and a new one."""
        bytes_of_chars = char_starts(text)
        chars = np.searchsorted(bytes_of_chars, old_starts)
        # A token that begins inside of a character begins no window.
        tokens = np.flatnonzero(bytes_of_chars[chars] == old_starts)
        chars = chars[tokens]
        starts = np.array([item.start for item in replacements])
        stops = np.array([item.stop for item in replacements])
        growth = np.array([len(item.new) - (item.stop - item.start) for item in replacements])
        before = np.append(0, np.cumsum(growth))
        behind = np.searchsorted(stops, chars, "right")
        put_there = starts[starts == stops]
        own = np.searchsorted(put_there, chars, "right") - np.searchsorted(put_there, chars)
        last = np.searchsorted(starts, chars) - 1
        inside = (last >= 0) & (chars < stops[last])
        new_bytes = char_starts(new_text)
        places = []
        for count in (behind - own, behind):
            # A place inside of a replacement has none in the new text; any will do, it is refused.
            there = new_bytes[np.clip(chars + before[count], 0, len(new_text))]
            places.append(np.where(~inside & np.isin(there, encoded.words), there, -1))
        begins, ends = places
        return cls(chars, tokens, begins, ends, replacements)


def windows(edges: Edges) -> list[Window]:
    """The smallest windows around all replacements; those that overlap are one."""
    begins = np.flatnonzero(edges.begins >= 0)
    ends = np.flatnonzero(edges.ends >= 0)
    found: list[tuple[int, int]] = []
    for item in edges.replacements:
        first = int(begins[np.searchsorted(edges.chars[begins], item.start, "right") - 1])
        last = int(ends[np.searchsorted(edges.chars[ends], item.stop)])
        empty = first == last
        if found and (
            first < found[-1][1] or (first == found[-1][1] and (empty or is_empty(found)))
        ):
            first = min(first, found[-1][0])
            last = max(last, found.pop()[1])
        found.append((first, last))
    return [
        Window(
            (int(edges.tokens[first]), int(edges.tokens[last])),
            range(int(edges.chars[first]), int(edges.chars[last])),
            (int(edges.begins[first]), int(edges.ends[last])),
        )
        for first, last in found
    ]


def is_empty(found: Sequence[tuple[int, int]]) -> bool:
    """Whether the last window holds no old token: text was put between two."""
    return found[-1][0] == found[-1][1]


def replaced(text: str, replacements: Sequence[Replacement]) -> str:
    """The text with its replacements."""
    parts = []
    at = 0
    for start, stop, new in replacements:
        parts += [text[at:start], new]
        at = stop
    return "".join([*parts, text[at:]])


def surrogates(text: str) -> bool:
    """Whether a text has bytes outside of characters."""
    return not text.isascii() and any(ESCAPED[0] <= char <= ESCAPED[1] for char in text)


def without_surrogates(text: str) -> str:
    """The text with a stand-in, of one character too, for each byte outside of a character."""
    if not surrogates(text):
        return text
    return "".join(STAND_IN if ESCAPED[0] <= char <= ESCAPED[1] else char for char in text)


def char_starts(text: str) -> NDArray[np.int64]:
    """(len(text) + 1,) bytes before each character, and at last all."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    widths[(points >= ord(ESCAPED[0])) & (points <= ord(ESCAPED[1]))] = 1
    return np.append(0, np.cumsum(widths))


def difference(old: str, new: str) -> list[Replacement]:
    """The replacement between what two texts begin and end with in common; [] if they are equal."""
    if old == new:
        return []
    shorter = min(len(old), len(new))
    start = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    most = shorter - start
    tail = next((i for i in range(most) if old[-1 - i] != new[-1 - i]), most)
    return [Replacement(start, len(old) - tail, new[start : len(new) - tail])]
