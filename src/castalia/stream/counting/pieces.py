"""The text of a block's rows, cut where documents meet: one buffer of UTF-8 with separators."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from castalia.stream.opening import Block
from castalia.tokenizers.token_texts import TokenTexts, decoder_kinds
from castalia.tokenizers.tokenizer import BYTES, Tokenizer

SEPARATOR = 0xFF
"""Byte between two pieces: UTF-8 never has it, so no match crosses it and no word touches it."""
PADDING = bytes([SEPARATOR]) * 16
"""Behind the buffer, so that 16 bytes can be read from every place."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of documents in a block's rows, P of them: as ids and as one buffer of text."""

    ids: NDArray[np.int64]
    """All ids; `separator` before the first piece and after each one."""
    separator: int
    """An id that no token has."""
    row: NDArray[np.int64]
    """(P,) row of the block that holds each piece."""
    text: bytes
    """All text; SEPARATOR before the first piece and after each one, then PADDING."""
    stops: NDArray[np.int64]
    """(P,) place of the separator behind each piece, in `text`."""
    tokens: int
    """Tokens of all pieces."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """(P,) place of each piece's first byte in `text`."""
        return np.concatenate(([1], self.stops[:-1] + 1))[: len(self.stops)]

    @cached_property
    def id_stops(self) -> NDArray[np.int64]:
        """(P,) place of the separator behind each piece, in `ids`."""
        return np.flatnonzero(self.ids == self.separator)[1:]

    def rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row that holds each place of `text`."""
        return self.row[np.searchsorted(self.stops, places)]

    def rows_at_ids(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row that holds each place of `ids`."""
        return self.row[np.searchsorted(self.id_stops, places)]

    def texts(self) -> Iterator[tuple[int, str]]:
        """Row and text of each piece; bytes that are no whole character are U+FFFD, as decoded."""
        for row, start, stop in zip(
            self.row.tolist(), self.starts.tolist(), self.stops.tolist(), strict=True
        ):
            yield row, self.text[start:stop].decode("utf-8", "replace")


class PieceTexts:
    """Makes the pieces of blocks, with the text that the tokenizer's `decode` gives each.

    The token that ends a document stands for no text. With `ignore_case` all text is in lower case.
    """

    def __init__(self, tokenizer: Tokenizer | None, ignore_case: bool = False) -> None:
        self.tokenizer = tokenizer
        self.ignore_case = ignore_case
        self.separator = 1 << 31
        if tokenizer is not None:
            self.separator = tokenizer.vocab_size
            self.bytewise = is_bytewise(tokenizer)
            self.make_table(tokenizer)

    def make_table(self, tokenizer: Tokenizer) -> None:
        """The bytes of every token end to end, and where those of each begin."""
        texts = TokenTexts(tokenizer)
        known = set(tokenizer.ids.values())
        # `decode` leaves out ids without a token.
        parts = [texts.bytes_of(i) if i in known else b"" for i in range(tokenizer.vocab_size)]
        if tokenizer.eod_id is not None:
            parts[tokenizer.eod_id] = b""
        parts.append(bytes([SEPARATOR]))
        self.lengths = np.array([len(part) for part in parts], np.int64)
        self.firsts = np.concatenate(([0], np.cumsum(self.lengths)[:-1]))
        self.buffer = np.frombuffer(b"".join(parts), np.uint8)

    def __call__(self, block: Block) -> Pieces:
        """The pieces of a block's rows."""
        width = block.tokens.shape[1]
        row = block.table.row_of_span
        lengths = block.table.lengths
        # A row that ends early is padded, and padding is no text.
        inside = np.arange(width) < block.filled[:, None]
        flat = block.tokens[inside].astype(np.int64, copy=False)
        borders = np.concatenate(([0], np.cumsum(lengths)))
        ids = np.insert(flat, borders, self.separator)
        text, stops = self.text_of(ids)
        return Pieces(ids, self.separator, row, text, stops, len(flat))

    def text_of(self, ids: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """The text of separated ids, and the place of the separator behind each piece."""
        if self.tokenizer is None:
            return PADDING, np.empty(0, np.int64)
        borders = np.flatnonzero(ids == self.separator)
        if not self.bytewise:
            parts = [self.decoded(ids[a + 1 : b]) for a, b in pairwise(borders)]
            return joined(parts, self.ignore_case)
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        places = np.repeat(self.firsts[ids] - (ends - lengths), lengths)
        places += np.arange(len(places))
        text = self.buffer[places].tobytes()
        stops = ends[borders[1:]] - 1
        if not self.ignore_case:
            return text + PADDING, stops
        if not (self.buffer[places] >= 0x80).sum() > len(borders):
            # Only the separators are no ASCII: no letter changes its length.
            return text.lower() + PADDING, stops
        starts = np.concatenate(([1], stops[:-1] + 1))[: len(stops)]
        return joined([text[a:b] for a, b in zip(starts, stops, strict=True)], True)

    def decoded(self, ids: NDArray[np.int64]) -> bytes:
        """The text of a piece, by the tokenizer itself."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids[ids != self.tokenizer.eod_id]).encode("utf-8")


def joined(parts: list[bytes], lower: bool) -> tuple[bytes, NDArray[np.int64]]:
    """Pieces with separators and padding, and the place of the separator behind each."""
    if lower:
        parts = [part.decode("utf-8", "replace").lower().encode("utf-8") for part in parts]
    between = bytes([SEPARATOR])
    stops = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    return between + b"".join(part + between for part in parts) + PADDING, stops


def is_bytewise(tokenizer: Tokenizer) -> bool:
    """Whether the text of ids is the text of each, end to end: byte-level BPE and single bytes.

    Others, such as SentencePiece's, drop or add spaces by what stands beside a token.
    """
    if tokenizer.kind in (BYTES, "char"):
        return True
    return tokenizer.kind == "json" and decoder_kinds(tokenizer) == {"ByteLevel"}


WORD = np.array([chr(i).isalnum() or chr(i) == "_" for i in range(1 << 16)])
"""Whether each character of the first 65,536 is one of a word, as `\\w` has it."""


def word_bytes(text: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each byte is part of a word character; a broken character is none."""
    words = WORD[text] & (text < 0x80)
    for size, lowest, highest, least in ((2, 0xC2, 0xDF, 0x80), (3, 0xE0, 0xEF, 0x800)):
        leads = np.flatnonzero((text >= lowest) & (text <= highest))
        mark_words(text, words, leads, size, least)
    leads = np.flatnonzero((text >= 0xF0) & (text <= 0xF4))
    mark_words(text, words, leads, 4, 0x10000)
    return words


def mark_words(
    text: NDArray[np.uint8],
    words: NDArray[np.bool_],
    leads: NDArray[np.int64],
    size: int,
    least: int,
) -> None:
    """Set `words` at the word characters of `size` bytes that begin at `leads`."""
    if not len(leads):
        return
    codes = (text[leads] & (0xFF >> (size + 1))).astype(np.int64)
    whole = np.ones(len(leads), np.bool_)
    for place in range(1, size):
        # PADDING stands behind the last character.
        byte = text[leads + place]
        whole &= (byte & 0xC0) == 0x80
        codes = codes << 6 | (byte & 0x3F)
    whole &= (codes >= least) & (codes <= 0x10FFFF)
    distinct, number = np.unique(codes, return_inverse=True)
    # Beyond the table character by character: they are few.
    among = np.array([code <= 0x10FFFF and chr(code).isalnum() for code in distinct.tolist()])
    found = leads[whole & among[number]]
    for place in range(size):
        words[found + place] = True
