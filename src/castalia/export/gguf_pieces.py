"""SentencePiece's own model files, read for llama.cpp, which splits text in their way.

Source  sentencepiece, src/sentencepiece_model.proto (names and numbers of fields).
"""

import base64
import json
import struct
from collections.abc import Iterator
from typing import NamedTuple

from castalia.tokenizers.forms import SentencePieceTokenizer

# Wire types of a protocol buffer.
VARINT = 0
WIDE = 1
BYTES = 2
NARROW = 5
BPE = 2
"""TrainerSpec.ModelType."""
NORMAL = 1
BYTE = 6
"""SentencePiece.Type, whose numbers are those of llama.cpp's kinds of tokens."""


class Pieces(NamedTuple):
    """What a GGUF file says of a SentencePiece model."""

    scores: list[float]
    kinds: list[int]
    """llama.cpp's kind of each token."""
    bpe: bool
    """Whether pieces are merged by their scores, as llama.cpp does."""
    prefix: bool
    """Whether a space is put before the text."""
    normalized: bool
    """Whether the text is changed before: characters mapped, or spaces removed."""

    @property
    def all_bytes(self) -> bool:
        """Whether characters without a piece become bytes."""
        return self.kinds.count(BYTE) == 256


def read_pieces(tokenizer: SentencePieceTokenizer) -> Pieces:
    """The model inside a tokenizer."""
    model = base64.b64decode(json.loads(tokenizer.text)["model"])
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in fields(model):
        if number == 1 and isinstance(value, bytes):
            piece = dict(fields(value))
            raw = piece.get(2, b"\0\0\0\0")
            assert isinstance(raw, bytes), "a score is a float"
            scores.append(struct.unpack("<f", raw)[0])
            kinds.append(as_number(piece.get(3, NORMAL)))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(fields(value))
    return Pieces(
        scores,
        kinds,
        bpe=trainer.get(3) == BPE,
        # Both are true where the file does not say.
        prefix=bool(normalizer.get(3, 1)),
        normalized=bool(normalizer.get(2, b"")) or bool(normalizer.get(4, 1)),
    )


def as_number(value: int | bytes) -> int:
    """A field that is an integer."""
    assert isinstance(value, int), "an enumeration is a varint"
    return value


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer; floats as their bytes."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        kind = key & 7
        if kind == VARINT:
            number, at = varint(message, at)
            yield key >> 3, number
            continue
        if kind == BYTES:
            size, at = varint(message, at)
        else:
            size = {WIDE: 8, NARROW: 4}[kind]
        yield key >> 3, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and the place behind it."""
    value = 0
    shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
