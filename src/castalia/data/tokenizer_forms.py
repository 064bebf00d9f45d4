"""Tokenizers in the other forms that GPT-NeoX takes: GPT-2's two files, SentencePiece, tiktoken, single bytes."""

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from castalia.core.errors import ConfigError, DataError
from castalia.core.extras import require
from castalia.data.tokenizer import END_NAMES, END_OF_TEXT, Tokenizer, byte_characters, byte_level

CHAR = "char"
CHAR_IDS = 512
"""GPT-NeoX's CharLevelTokenizer has so many ids, of which text uses 256."""
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS: dict[str, tuple[str | None, dict[str, int]]] = {
    "gpt2": (None, {END_OF_TEXT: 50256}),
    "r50k_base": (None, {END_OF_TEXT: 50256}),
    "p50k_base": (None, {END_OF_TEXT: 50256}),
    "cl100k_base": (CL100K, {END_OF_TEXT: 100257, **FIM, "<|endofprompt|>": 100276}),
    "o200k_base": (O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}
"""How each encoding splits text (None: as GPT-2), and its special tokens; a .tiktoken file has neither.

Source  tiktoken_ext/openai_public.py of tiktoken.
"""


def load_form(name: str) -> Tokenizer | None:
    """The tokenizer of a name that is no tokenizer.json; None if it is another name.

    The names are `char`, VOCAB.json with MERGES.txt after a comma or beside it, X.tiktoken and X.model.

    Raises  DataError if a file is missing or damaged; ConfigError if sentencepiece is needed and not installed.
    """
    if name == CHAR:
        return CharTokenizer()
    if "," in name:
        vocab, _, merges = name.partition(",")
        return gpt2_tokenizer(Path(vocab), Path(merges))
    path = Path(name)
    if path.suffix == ".tiktoken":
        return tiktoken_tokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(read_bytes(path), str(path))
    if path.suffix == ".json" and "vocab" in path.name:
        return gpt2_tokenizer(
            path, path.with_name(path.name.replace("vocab", "merges")).with_suffix(".txt")
        )
    if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "merges.txt").exists():
        return gpt2_tokenizer(path / "vocab.json", path / "merges.txt")
    return None


def from_text(text: str, where: str) -> Tokenizer | None:
    """A tokenizer that one of these forms saved in the place of a tokenizer.json; None if it is not one of ours."""
    if not text.startswith('{"castalia":'):
        return None
    try:
        facts = json.loads(text)
        if facts["castalia"] == CHAR:
            return CharTokenizer()
        return SentencePieceTokenizer(base64.b64decode(facts["model"]), where)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a tokenizer ({error})") from None


def read_bytes(path: Path) -> bytes:
    """A tokenizer's file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: no such tokenizer file ({error.strerror})") from None


def gpt2_tokenizer(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """GPT-2's byte-level BPE out of its vocabulary (JSON, token to id) and its merges (a pair a line)."""
    try:
        vocab = json.loads(read_bytes(vocab_path).decode("utf-8"))
        lines = read_bytes(merges_path).decode("utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in pairs]
        model = models.BPE(vocab=vocab, merges=merges)
    except DataError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(
            f"{vocab_path} and {merges_path}: not GPT-2's vocabulary and merges ({error})"
        ) from None
    inner = byte_level(tokenizers.Tokenizer(model), use_regex=True)
    if END_OF_TEXT in vocab:
        inner.add_special_tokens(
            [tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)]
        )
    return Tokenizer(inner.to_str(), str(vocab_path))


def tiktoken_tokenizer(path: Path) -> Tokenizer:
    """The encoding of a .tiktoken file, which its name says: cl100k_base.tiktoken and so on.

    tiktoken joins whichever neighbours make the token of lowest rank; a BPE does the same with every pair of tokens
    that makes a token as a merge, in the order of what they make, and whole words that are tokens taken as they are.
    """
    known = ENCODINGS.get(path.stem)
    if known is None:
        names = ", ".join(ENCODINGS)
        raise ConfigError(
            f"{path}: an encoding of this name is not known; name the file after one of {names}"
        )
    ranks = read_ranks(path)
    pattern, special = known
    as_text = byte_characters()
    spelled = {token: "".join(as_text[byte] for byte in token) for token in ranks}
    pairs = [
        (rank, ranks[token[:i]], ranks[token[i:]], (spelled[token[:i]], spelled[token[i:]]))
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    model = models.BPE(vocab=vocab, merges=[pair for *_, pair in sorted(pairs)], ignore_merges=True)
    inner = byte_level(tokenizers.Tokenizer(model), use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
        inner.decoder = decoders.ByteLevel()
    added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in special]
    inner.add_special_tokens(added)
    return Tokenizer(inner.to_str(), str(path))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token to rank of a .tiktoken file: base64 and a number a line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(
                f"{path}:{number}: expected a token in base64 and its rank, got {line[:80]!r}"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"{path}: no token for byte {missing[0]}; the file is cut off or of another kind"
        )
    return ranks


class OtherTokenizer(Tokenizer):
    """A tokenizer that is not one of the tokenizers library; `text` stands in the place of a tokenizer.json."""

    def __init__(self, text: str, where: str, ids: dict[str, int], vocab_size: int) -> None:
        self.text, self.where, self.ids, self.vocab_size = text, where, ids, vocab_size
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.eod_id = next((ids[name] for name in END_NAMES if name in ids), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def __setstate__(self, state: dict[str, str]) -> None:
        found = from_text(state["text"], state["where"])
        assert found is not None
        self.__dict__.update(found.__dict__)


class CharTokenizer(OtherTokenizer):
    """GPT-NeoX's CharLevelTokenizer: ids are the bytes of UTF-8, 0 ends a document, 512 ids in all."""

    kind = CHAR

    def __init__(self) -> None:
        ids = {character: byte for byte, character in byte_characters().items()}
        super().__init__(json.dumps({"castalia": CHAR}), CHAR, ids, CHAR_IDS)
        self.eod_id = 0

    def encode(self, text: str) -> list[int]:
        """Ids of one text: its bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; what is no byte, or not UTF-8, becomes U+FFFD."""
        return bytes(i if i < 256 else 0xFF for i in ids).decode("utf-8", "replace")


class SentencePieceTokenizer(OtherTokenizer):
    """A SentencePiece .model, by its own library; <|endoftext|> ends a document if it is a piece, else </s>."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, where: str) -> None:
        library = require("sentencepiece", "spm", f"the tokenizer {where}")
        try:
            self.pieces: Any = library.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the library raises RuntimeError and others
            raise DataError(f"{where}: not a SentencePiece model ({error})") from None
        count = self.pieces.get_piece_size()
        text = json.dumps({"castalia": self.kind, "model": base64.b64encode(model).decode("ascii")})
        super().__init__(text, where, {self.pieces.id_to_piece(i): i for i in range(count)}, count)

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ids: list[int] = self.pieces.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") else -1
        ids: list[list[int]] = self.pieces.encode(texts, num_threads=threads)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        text: str = self.pieces.decode([int(i) for i in ids])
        return text
