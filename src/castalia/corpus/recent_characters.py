"""Characters that two libraries may tokenize differently because their Unicode tables differ.

Tokenizers normalize text (NFC, NFKC) and ask for categories (letter, mark, digit). A character that
is younger than one library's Unicode version is unassigned there and treated differently.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

ASCII = bytes(range(128))
OLDEST = unicodedata.ucd_3_2_0
"""Every Unicode table in use is at least this old. The normalization of its characters never
changes (unicode.org/policies/stability_policy.html)."""
SAME = 0
UNTRIED = 1
DIFFERENT = 2
"""State of a character: all tables agree; a trial must show it; tables may disagree."""
PICTURES = range(0x1F000, 0x1FB00)
"""Blocks of emoji and other symbols: neither normalization nor word boundaries depend on them."""
CODE_POINTS = 0x110000
HAN_PLANES = slice(0x2A6D7, 0x40000)
"""Han letters added since Unicode 3.2, and those to come; they do not combine with marks."""
UNASSIGNED = (slice(0x40000, 0xE0000), slice(0xE0200, 0xF0000))
"""Planes without characters so far. Private-use characters, above, are the same in all tables."""
TRIED_RANGES = (
    (0x80, 0x3400),
    (0x4DB6, 0x4E00),
    (0x9FA6, 0xAC00),
    (0xD7A4, 0x20000),
    (0xE0000, 0xE0200),
)
"""Code points examined one by one: all others but Unicode 3.2's Han letters and Hangul."""
FORM = "a{0}\u0316\u0301x a\u0316{0}x a\u0301{0}\u0323 {0}{0} a{0} 1{0} {0}b !{0}"
"""A text that shows the order of character {0} among marks, and whether it is a letter or digit."""
JOINED = " {0} {0}x {1} {1}x"
"""Added for a character {0} that NFC composes of others, {1}."""
CHUNK_BYTES = 1 << 18
"""UTF-8 decoded at a time; UTF-32 takes four times as much."""


@lru_cache(maxsize=1)
def recent_characters() -> tuple[NDArray[np.uint8], dict[int, str]]:
    """The state of each character (0x110000,) before any trial, and the texts to try beside FORM.

    UNTRIED are letters, marks and digits younger than OLDEST; DIFFERENT are unassigned code points,
    which a future table may define. Once a table knows a character, its order among marks and its
    decomposition never change (the policy above). So tables differ only in the characters that they
    know, and one trial shows whether two libraries both know a character or both do not.
    """
    states = np.zeros(CODE_POINTS, np.uint8)
    states[HAN_PLANES] = UNTRIED
    for plane in UNASSIGNED:
        states[plane] = DIFFERENT
    trials: defaultdict[int, str] = defaultdict(str)
    for code in chain.from_iterable(range(*span) for span in TRIED_RANGES):
        character = chr(code)
        if OLDEST.category(character) != "Cn" or code in PICTURES:
            continue
        category = unicodedata.category(character)
        decomposition = unicodedata.decomposition(character)
        if category == "Cn":
            states[code] = DIFFERENT
        elif category[0] in "LMN" or decomposition:
            states[code] = UNTRIED
        # A canonical decomposition (without <tag>) of several characters: NFC composes them, so
        # each of them alone may reveal the difference.
        if " " in decomposition and not decomposition.startswith("<"):
            parts = [int(part, 16) for part in decomposition.split()]
            text = JOINED.format(character, "".join(map(chr, parts)))
            for affected in (code, *parts):
                trials[affected] += text
    return states, trials


class RecentCharacters:
    """Finds texts on which two tokenizers may disagree. Each recent character is tried once.

    `same` says for each of some texts whether both tokenizers give equal ids.
    """

    def __init__(self, same: Callable[[list[str]], list[bool]]) -> None:
        states, self.trials = recent_characters()
        self.states = states.copy()
        self.same = same

    def __call__(self, text: bytes) -> bool:
        """Whether a text in UTF-8 has a character that the tokenizers may take differently."""
        # The hot path: most texts are ASCII, and of others only the rest is decoded.
        return not text.isascii() and any(map(self.differ, codes_of(text.translate(None, ASCII))))

    def differ(self, codes: NDArray[np.uint32]) -> bool:
        """Whether any of these code points is DIFFERENT; tries those that are UNTRIED first."""
        states = self.states[codes]
        if not states.any():
            return False
        untried = np.unique(codes[states == UNTRIED])
        if len(untried):
            texts = [
                FORM.format(chr(code)) + self.trials.get(code, "") for code in untried.tolist()
            ]
            self.states[untried] = np.where(self.same(texts), SAME, DIFFERENT)
        return bool((self.states[codes] == DIFFERENT).any())


def codes_of(text: bytes) -> Iterator[NDArray[np.uint32]]:
    """Code points of a text in UTF-8, in chunks.

    Chunks overlap by 3 bytes, so that a character across a border is complete in one of them.
    """
    for start in range(0, len(text), CHUNK_BYTES):
        chunk = text[start : start + CHUNK_BYTES + 3].decode("utf-8", "ignore")
        yield np.frombuffer(chunk.encode("utf-32-le"), "<u4")
