"""Characters that two libraries may take otherwise because their tables are of different versions of Unicode."""

import unicodedata
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
PIECE_BYTES = 1 << 18


@lru_cache(maxsize=1)
def young_characters() -> NDArray[np.uint8]:
    """What is known of each character (0x110000,) before one is tried: UNTRIED for letters, marks and digits younger
    than any table; OTHER for what is no character yet, and for those that NFC joins with another young one."""
    known = np.zeros(0x110000, np.uint8)
    known[0x2A6D7:0x40000] = UNTRIED  # planes of Han letters, which no marks go with
    known[0x40000:0xF0000] = OTHER  # planes without letters so far
    spans = (0x80, 0x3400), (0x4DB6, 0x4E00), (0x9FA6, 0xAC00), (0xD7A4, 0x20000)  # all but old Han and Hangul
    for i in chain.from_iterable(range(*span) for span in spans):
        character = chr(i)
        if OLDEST.category(character) != "Cn" or i in PICTURES:
            continue
        kind, made_of = unicodedata.category(character), unicodedata.decomposition(character)
        if kind == "Cn" or (" " in made_of and not made_of.startswith("<")):
            joined = [i, *(int(part, 16) for part in made_of.split())]
            known[[code for code in joined if OLDEST.category(chr(code)) == "Cn"]] = OTHER
        elif (kind[0] in "LMN" or made_of) and known[i] != OTHER:
            known[i] = UNTRIED
    return known


class Young:
    """Finds the texts for which two tokenizers are not sure to agree. `same` says for which of some texts they do; each
    young character is tried once, when it first comes."""

    def __init__(self, same: Callable[[list[str]], list[bool]]) -> None:
        self.same, self.known = same, young_characters().copy()

    def __call__(self, text: bytes) -> bool:
        """Whether a text of UTF-8 has a character that they may take otherwise."""
        return not text.isascii() and any(map(self.differs, codes_of(text.translate(None, ASCII))))

    def differs(self, codes: NDArray[np.uint32]) -> bool:
        """Whether there is one among these, having tried those that are new."""
        if not (known := self.known[codes]).any():
            return False
        if len(untried := np.unique(codes[known == UNTRIED])):
            self.known[untried] = np.where(self.same([FORM.format(chr(code)) for code in untried]), SAME, OTHER)
        return bool((self.known[codes] == OTHER).any())


def codes_of(text: bytes) -> Iterator[NDArray[np.uint32]]:
    """Code points of a text of UTF-8, in pieces that overlap, so that none is missed."""
    for start in range(0, len(text), PIECE_BYTES):
        piece = text[start : start + PIECE_BYTES + 3].decode("utf-8", "ignore")
        yield np.frombuffer(piece.encode("utf-32-le"), "<u4")
