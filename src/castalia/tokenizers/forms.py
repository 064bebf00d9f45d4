"""The other tokenizer formats of GPT-NeoX: GPT-2's two files, SentencePiece, tiktoken, single
bytes."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.core.extras import require
from castalia.tokenizers.tokenizer import (
    END_NAMES,
    END_OF_TEXT,
    Tokenizer,
    byte_characters,
    byte_level,
)

CHAR = "char"
CHAR_IDS = 512
"""Ids of GPT-NeoX's CharLevelTokenizer, of which text uses 256."""
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
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
"""How each encoding splits text (None: as GPT-2), and its special tokens. A .tiktoken file holds
neither.

Source  tiktoken_ext/openai_public.py of tiktoken.
"""

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")
"""First line of a .tiktoken file."""
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
"""The 256 special tokens of LLaMA 3, which follow the ranks; names as in the published 3.1.

Source  llama-models, models/llama3/tokenizer.py; reserved names differ between 3 and 3.1.
"""


def load_form(name: str) -> Tokenizer | None:
    """The tokenizer behind a name of one of these formats; None for any other name.

    The names are `char`, VOCAB.json with MERGES.txt after a comma or beside it, X.tiktoken and
    X.model.

    Raises  DataError if a file is missing or damaged; ConfigError if sentencepiece is needed but
            not installed.
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
        content = read_bytes(path)
        # LLaMA 3's tokenizer.model is a tiktoken file, earlier ones are SentencePiece's.
        if RANK_LINE.match(content):
            return llama3_tokenizer(path)
        return SentencePieceTokenizer(content, str(path))
    if path.suffix == ".json" and "vocab" in path.name:
        merges_name = path.name.replace("vocab", "merges")
        return gpt2_tokenizer(path, path.with_name(merges_name).with_suffix(".txt"))
    if path.is_dir() and not (path / "tokenizer.json").exists():
        if (path / "merges.txt").exists():
            return gpt2_tokenizer(path / "vocab.json", path / "merges.txt")
        if (path / "tokenizer.model").exists():
            return load_form(str(path / "tokenizer.model"))
    return None


def from_text(text: str, where: str) -> Tokenizer | None:
    """The tokenizer in a file saved by one of these formats; None for a real tokenizer.json."""
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
    """The bytes of a tokenizer file.

    Raises  DataError if it is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer file: {error.strerror}") from None


def gpt2_tokenizer(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its vocabulary (JSON) and its merges (one pair per line).

    Raises  DataError if a file is missing or damaged.
    """
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
    """The encoding in a .tiktoken file, identified by its name, such as cl100k_base.tiktoken.

    tiktoken merges whichever neighbours make the token of the lowest rank. A BPE does the same if
    every pair of tokens that makes a token is a merge, in the order of the results, and if whole
    words that are tokens are taken as they are.

    Raises  ConfigError for an unknown encoding; DataError if the file is missing or damaged.
    """
    if path.stem not in ENCODINGS:
        raise ConfigError(
            f"{path}: unknown encoding {path.stem!r}; name the file after one of"
            f" {', '.join(ENCODINGS)}{nearest(path.stem, ENCODINGS)}"
        )
    pattern, special = ENCODINGS[path.stem]
    return bpe_of_ranks(read_ranks(path), pattern, special, path)


def llama3_tokenizer(path: Path) -> Tokenizer:
    """LLaMA 3's tokenizer.model: ranks as tiktoken writes them, split as in cl100k_base.

    Raises  DataError if the file is damaged.
    """
    ranks = read_ranks(path)
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    return bpe_of_ranks(ranks, CL100K, special, path)


def bpe_of_ranks(
    ranks: dict[bytes, int], pattern: str | None, special: dict[str, int], path: Path
) -> Tokenizer:
    """A BPE that merges as tiktoken does; `pattern` splits text, None as GPT-2 does."""
    characters = byte_characters()
    spelled = {}
    for token in ranks:
        spelled[token] = "".join(characters[byte] for byte in token)
    merges = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left = token[:i]
            right = token[i:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], (spelled[left], spelled[right])))
    pairs = [pair for *_, pair in sorted(merges)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=True)
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
    """Token -> rank, from the lines of a .tiktoken file: a token in base64 and its rank.

    Raises  DataError if a line is damaged, or a byte has no token.
    """
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
            f"{path}: no token for byte {missing[0]}; the file is truncated, or not a .tiktoken"
            " file"
        )
    return ranks


class OtherTokenizer(Tokenizer):
    """A tokenizer outside the tokenizers library; `text` takes the place of its tokenizer.json."""

    def __init__(self, text: str, where: str, ids: dict[str, int], vocab_size: int) -> None:
        self.text = text
        self.where = where
        self.ids = ids
        self.vocab_size = vocab_size
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.eod_id = next((ids[name] for name in END_NAMES if name in ids), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = from_text(state["text"], state["where"])
        assert loaded is not None
        self.__dict__.update(loaded.__dict__)
        self.end_with(state["end"])


class CharTokenizer(OtherTokenizer):
    """GPT-NeoX's CharLevelTokenizer: 512 ids, of which 256 are UTF-8 bytes; 0 ends a document."""

    kind = CHAR

    def __init__(self) -> None:
        ids = {character: byte for byte, character in byte_characters().items()}
        super().__init__(json.dumps({"castalia": CHAR}), CHAR, ids, CHAR_IDS)
        self.eod_id = 0

    def encode(self, text: str) -> list[int]:
        """Ids of one text: its bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids that are not bytes, and bytes that are not UTF-8, become U+FFFD."""
        # 0xFF never occurs in UTF-8.
        return bytes(i if i < 256 else 0xFF for i in ids).decode("utf-8", "replace")


class SentencePieceTokenizer(OtherTokenizer):
    """A SentencePiece .model, read by its library.

    <|endoftext|> or its kin ends a document, else the model's own end of a sentence.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, where: str) -> None:
        library = require("sentencepiece", "spm", f"the tokenizer {where}")
        try:
            self.pieces: Any = library.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the library raises RuntimeError and others
            raise DataError(f"{where}: not a SentencePiece model ({error})") from None
        self.model = model
        count = self.pieces.get_piece_size()
        text = json.dumps({"castalia": self.kind, "model": base64.b64encode(model).decode("ascii")})
        super().__init__(text, where, {self.pieces.id_to_piece(i): i for i in range(count)}, count)
        if self.eod_id is None and self.pieces.eos_id() >= 0:
            self.eod_id = self.pieces.eos_id()

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ids: list[int] = self.pieces.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        # The variable limits the tokenizers library to one core, so it does here.
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") else -1
        ids: list[list[int]] = self.pieces.encode(texts, num_threads=threads)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        text: str = self.pieces.decode([int(i) for i in ids])
        return text
