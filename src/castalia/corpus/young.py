"""Characters that two libraries may take otherwise because their tables are of different versions of Unicode."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

ASCII = bytes(range(128))
OLDEST = unicodedata.ucd_3_2_0
"""No table of Unicode in use is older, and what NFC and NFKC make of its characters never changes
(unicode.org/policies/stability_policy.html)."""
SAME, UNTRIED, OTHER = 0, 1, 2
"""What is known of a character: all tables agree, it has to be tried, they may differ."""
PICTURES = range(0x1F000, 0x1FB00)
"""Blocks of emoji and other symbols: whatever comes there, neither NFC nor words depend on it."""
FORM = "a{0}\u0316\u0301x a\u0316{0}x a\u0301{0}\u0323 {0}{0} a{0} 1{0} {0}b !{0}"
"""A text that shows how a character is ordered among marks, and whether it is letter, digit, or neither."""
JOINED = " {0} {0}x {1} {1}x"
"""And one for each character that NFC makes of it and another one, {0}, which are {1}."""
PIECE_BYTES = 1 << 18


@lru_cache(maxsize=1)
def young_characters() -> tuple[NDArray[np.uint8], dict[int, str]]:
    """What is known of each character (0x110000,) before one is tried: UNTRIED for letters, marks and digits younger
    than any table, OTHER for what is no character yet. And what to try beside FORM with those that NFC joins to one.

    Once a table knows a character, its order among marks and what it is made of never change (the policy above), so
    tables differ only in which they know, and a trial shows whether both know it or neither.
    """
    known, pairs = np.zeros(0x110000, np.uint8), defaultdict[int, str](str)
    known[0x2A6D7:0x40000] = UNTRIED  # planes of Han letters, which no marks go with
    known[0x40000:0xE0000] = known[0xE0200:0xF0000] = OTHER  # planes without letters so far
    spans = (
        (0x80, 0x3400),
        (0x4DB6, 0x4E00),
        (0x9FA6, 0xAC00),
        (0xD7A4, 0x20000),
        (0xE0000, 0xE0200),
    )  # no old Han
    for i in chain.from_iterable(range(*span) for span in spans):
        character = chr(i)
        if OLDEST.category(character) != "Cn" or i in PICTURES:
            continue
        kind, made_of = unicodedata.category(character), unicodedata.decomposition(character)
        if kind == "Cn":
            known[i] = OTHER
        elif kind[0] in "LMN" or made_of:
            known[i] = UNTRIED
        if " " in made_of and not made_of.startswith("<"):
            parts = [int(part, 16) for part in made_of.split()]
            for code in (i, *parts):
                pairs[code] += JOINED.format(character, "".join(map(chr, parts)))
    return known, pairs


class Young:
    """Finds the texts for which two tokenizers are not sure to agree. `same` says for which of some texts they do; each
    young character is tried once, when it first comes."""

    def __init__(self, same: Callable[[list[str]], list[bool]]) -> None:
        known, self.pairs = young_characters()
        self.same, self.known = same, known.copy()

    def __call__(self, text: bytes) -> bool:
        """Whether a text of UTF-8 has a character that they may take otherwise."""
        return not text.isascii() and any(map(self.differs, codes_of(text.translate(None, ASCII))))

    def differs(self, codes: NDArray[np.uint32]) -> bool:
        """Whether there is one among these, having tried those that are new."""
        if not (known := self.known[codes]).any():
            return False
        if len(untried := np.unique(codes[known == UNTRIED])):
            texts = [FORM.format(chr(code)) + self.pairs.get(code, "") for code in untried.tolist()]
            self.known[untried] = np.where(self.same(texts), SAME, OTHER)
        return bool((self.known[codes] == OTHER).any())


def codes_of(text: bytes) -> Iterator[NDArray[np.uint32]]:
    """Code points of a text of UTF-8, in pieces that overlap, so that none is missed."""
    for start in range(0, len(text), PIECE_BYTES):
        piece = text[start : start + PIECE_BYTES + 3].decode("utf-8", "ignore")
        yield np.frombuffer(piece.encode("utf-32-le"), "<u4")
