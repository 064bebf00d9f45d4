"""What one token stands for inside a text, in bytes: tokens need not end where characters do."""

import json
import re
from collections.abc import Callable
from typing import Any

from castalia.tokenizers.tokenizer import BYTES, Tokenizer, byte_characters

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""A decoder's character for bytes that do not form a whole character yet."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte of SentencePiece's byte fallback."""


class TokenTexts:
    """The bytes of every token of a tokenizer, found when they are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.names = tokenizer.tokens()
        self.known: dict[int, bytes] = {}
        self.find = finder(self)

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 that a token adds to a text that goes on; a part of a character, maybe."""
        if token not in self.known:
            self.known[token] = self.find(token)
        return self.known[token]

    def name_of(self, token: int) -> str:
        """The token as its tokenizer spells it, for a token that ends a text."""
        return self.names[token]

    def byte_of_name(self, token: int) -> bytes:
        """The byte of a byte-fallback token; the text of any other."""
        name = BYTE_TOKEN.fullmatch(self.names[token])
        return self.behind_a_letter(token) if name is None else bytes.fromhex(name[1])

    def behind_a_letter(self, token: int) -> bytes:
        """The text of a token behind a letter: at the beginning of a text a decoder may drop the
        space that the token begins with."""
        letter = self.tokenizer.encode("a")
        alone = self.tokenizer.decode(letter)
        text = self.tokenizer.decode([*letter, token])
        if text.startswith(alone):
            return text[len(alone) :].encode("utf-8")
        return self.tokenizer.decode([token]).encode("utf-8")


def finder(texts: TokenTexts) -> Callable[[int], bytes]:
    """How the bytes of a token are found, by the kind of the tokenizer."""
    tokenizer = texts.tokenizer
    if tokenizer.kind == "char":
        return lambda token: bytes([token]) if token < 256 else BROKEN.encode("utf-8")
    if tokenizer.kind == "sentencepiece":
        return texts.byte_of_name
    kinds = decoder_kinds(tokenizer)
    if "ByteLevel" in kinds or tokenizer.kind == BYTES:
        byte_of = {character: byte for byte, character in byte_characters().items()}

        def mapped(token: int) -> bytes:
            name = texts.names[token]
            # As the ByteLevel decoder: a token with any other character stands for its own text.
            if all(character in byte_of for character in name):
                return bytes(byte_of[character] for character in name)
            return name.encode("utf-8")

        return mapped
    return texts.byte_of_name if "ByteFallback" in kinds else texts.behind_a_letter


def decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """Types of the decoders of a tokenizer.json."""
    decoder = tokenizer.inner.decoder
    if decoder is None:
        return set()
    # The state that pickle takes is the decoder's part of the tokenizer.json.
    described: dict[str, Any] = json.loads(decoder.__getstate__())
    parts = described.get("decoders", [described])
    return {str(part["type"]) for part in parts}


def spelled(raw: bytes) -> str:
    r"""Bytes as text; those that are not whole characters as OpenAI writes them, `bytes:\xf0`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(map(escaped, raw))


def escaped(byte: int) -> str:
    r"""A printable ASCII character, or `\xf0`."""
    if 0x20 <= byte < 0x7F and byte != ord("\\"):
        return chr(byte)
    return f"\\x{byte:02x}"
