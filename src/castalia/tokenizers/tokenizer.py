"""From text to ids and back: any `tokenizer.json`, the byte-level tokenizer, and training a new
one."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write
from castalia.core.hub import TOKENIZER_FILES, hub_folder, is_hub_id
from castalia.tokenizers.settings import TextEnd, text_end

END_OF_TEXT = "<|endoftext|>"
PADDING_TOKEN = "<|padding|>"
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
"""Names of the end-of-document token in various tokenizers, in order of preference."""
BYTES = "bytes"
"""Name of the byte-level tokenizer."""
BYTE_IDS = 256 + 1
"""Ids of the byte-level tokenizer: every byte, and <|endoftext|>."""
FILE_ENDINGS = (".json", ".model", ".tiktoken", ".txt")
"""A name with one of these is a file that may be missing, never a model of the hub."""
SMALLEST_BPE = 256 + 2
"""One id for every byte and for each of the two special tokens."""


class Tokenizer:
    """A `tokenizer.json`: text to ids and back.

    `encode` adds no special tokens, but the name of a special token inside a text becomes its id,
    as in the tokenizers library. `vocab_size` is the highest id + 1; `eod_id` is the id that ends a
    document, None without one: the one that the tokenizer's folder names, `end`, else the first of
    END_NAMES in the vocabulary. `kind` is `bytes` or `json`; `text` is the tokenizer.json as it was
    read, `sha256` its hash. Pickles, and is safe to use from several threads.

    Raises  DataError if `text` is not a tokenizer.json; `where` names it in the error.
    """

    kind = "json"
    end: TextEnd | None = None
    """The end of a text according to the tokenizer's folder."""

    def __init__(self, text: str, where: str = "the tokenizer") -> None:
        self.text = text
        self.where = where
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        try:
            self.inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(
                f"{where}: not a tokenizer.json of the tokenizers library ({error})"
            ) from None
        # A saved tokenizer may cut or pad every text, which would lose tokens silently.
        self.inner.no_truncation()
        self.inner.no_padding()
        self.ids: dict[str, int] = self.inner.get_vocab(with_added_tokens=True)
        if not self.ids:
            raise DataError(f"{where}: the tokenizer has no tokens")
        self.vocab_size = max(self.ids.values()) + 1
        self.eod_id = next((self.ids[name] for name in END_NAMES if name in self.ids), None)

    def end_with(self, end: TextEnd | None) -> None:
        """Take the end of a text that a folder names, if the vocabulary has it."""
        self.end = end
        number = None if end is None else self.id_of(end.token)
        if number is not None:
            self.eod_id = number

    def id_of(self, token: str | int) -> int | None:
        """The id of a token, given by its text or as an id; None if the vocabulary lacks it."""
        if isinstance(token, str):
            return self.ids.get(token)
        return token if 0 <= token < self.vocab_size else None

    @cached_property
    def longest(self) -> int:
        """Characters of the longest spelling of a token: one for each byte, or each character."""
        return max(map(len, self.ids))

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; the tokenizers library uses several cores."""
        # The fast variant does not compute the offsets of tokens in the text.
        encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, with the names of special tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.inner.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def tokens(self) -> list[str]:
        """Every token as the tokenizer.json spells it, by id; unused ids get a made-up name."""
        names = {i: name for name, i in self.ids.items()}
        tokens = []
        for i in range(self.vocab_size):
            name = names.get(i)
            tokens.append(unused_name(i, self.ids) if name is None else name)
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its tokenizer.json atomically, byte for byte as it was read."""
        with atomic_write(Path(path), "wb") as file:
            file.write(self.text.encode("utf-8"))

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text, "where": self.where, "end": self.end}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, state["text"], state["where"])
        self.end_with(state["end"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where!r}, {self.vocab_size} ids)"


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is <|endoftext|>.

    Its tokenizer.json gives the same ids, so that an export works with every reader of
    tokenizer.json.
    """

    kind = BYTES

    def __init__(self, text: str | None = None, where: str = BYTES) -> None:
        super().__init__(byte_level_json() if text is None else text, where)

    def encode(self, text: str) -> list[int]:
        """Ids of one text: its bytes, unless it spells out <|endoftext|>."""
        if END_OF_TEXT in text:
            return super().encode(text)
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        if any(END_OF_TEXT in text for text in texts):
            return super().encode_batch(texts)
        return [self.encode(text) for text in texts]


def unused_name(i: int, taken: dict[str, int]) -> str:
    """A name for an id without a token, different from every token."""
    name = f"<|unused {i}|>"
    while name in taken:
        name += "_"
    return name


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte, as used by the ByteLevel parts of `tokenizers`.

    Source  openai/gpt-2 src/encoder.py, bytes_to_unicode: printable Latin-1 stays, the rest moves
            to 256 and up.
    """
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    characters = {byte: chr(byte) for byte in kept}
    for i, byte in enumerate(moved):
        characters[byte] = chr(256 + i)
    return characters


def byte_level_json() -> str:
    """A tokenizer.json whose ids are bytes: a BPE without merges, plus <|endoftext|>."""
    vocab = {character: byte for byte, character in byte_characters().items()}
    inner = byte_level(tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])), use_regex=False)
    inner.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    text: str = inner.to_str(pretty=True)
    return text


def byte_level(inner: Any, use_regex: bool) -> Any:
    """Give `inner` the ByteLevel parts, which lose no text and add no space."""
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """Load a `tokenizer.json`, a folder that holds one, a run, or OWNER/NAME[@REVISION] of the hub.

    `bytes` is the byte-level tokenizer; `forms` adds `char`, VOCAB.json,MERGES.txt of
    GPT-2, X.tiktoken and SentencePiece's X.model. The folder's other files say which token ends a
    document.

    Raises  DataError if the file is missing or not a tokenizer; CheckpointError if a model of the
            hub is neither cached nor reachable.
    """
    name = os.fspath(name_or_path)
    if name == BYTES:
        return ByteTokenizer()
    if is_hub_id(name) and not name.endswith(FILE_ENDINGS):
        name = str(hub_folder(name, files=TOKENIZER_FILES))
    tokenizer = read_tokenizer(name)
    file = Path(tokenizer.where)
    if file.is_file():
        tokenizer.end_with(text_end(file.parent))
    return tokenizer


def read_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file or folder, by itself.

    Raises  DataError if the file is missing or not a tokenizer.
    """
    from castalia.tokenizers import forms  # here, because it imports this module

    other_form = forms.load_form(name)
    if other_form is not None:
        return other_form
    path = Path(name)
    if path.is_dir():
        path = file_in(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such tokenizer file; give the path of a tokenizer.json, OWNER/NAME of the"
            " hub, or `bytes`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a tokenizer.json ({error})") from None
    saved_form = forms.from_text(text, str(path))
    if saved_form is not None:
        return saved_form
    tokenizer = Tokenizer(text, str(path))
    if is_byte_level(tokenizer):
        return ByteTokenizer(text, str(path))
    return tokenizer


def file_in(folder: Path) -> Path:
    """The tokenizer.json of a folder; of a run's folder that of its newest checkpoint."""
    own = folder / "tokenizer.json"
    if own.exists():
        return own
    saved = sorted(folder.glob("checkpoints/step-*/tokenizer.json"))
    complete = [path for path in saved if (path.parent / "COMPLETE").exists()]
    if complete:
        return complete[-1]
    # The error about the missing file names this one.
    return own


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether this is the byte-level tokenizer, saved and loaded again."""
    if tokenizer.vocab_size != BYTE_IDS:
        return False
    return bool(tokenizer.inner.to_str() == ByteTokenizer().inner.to_str())


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]
) -> Tokenizer:
    """Train a byte-level BPE as `train_bpe` does, and write it to `path` as a tokenizer.json."""
    tokenizer = train_bpe(texts, vocab_size, str(path))
    tokenizer.save(path)
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, where: str = "the tokenizer") -> Tokenizer:
    """Train a byte-level BPE on `texts`.

    <|endoftext|> is id 0 and <|padding|> id 1, as in GPT-NeoX's own tokenizer. Every text can be
    encoded and decodes unchanged. A small corpus may give fewer than `vocab_size` ids.

    Raises  ConfigError if vocab_size is below 258; DataError if all texts are empty.
    """
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"a byte-level BPE needs at least {SMALLEST_BPE} ids (256 bytes and 2 special tokens),"
            f" got {vocab_size}"
        )
    inner = byte_level(tokenizers.Tokenizer(models.BPE()), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(not_empty(texts), trainer=trainer)
    return Tokenizer(inner.to_str(pretty=True), where)


def not_empty(texts: Iterable[str]) -> Iterator[str]:
    """Pass the texts through.

    Raises  DataError at the end, if all of them were empty.
    """
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise DataError("cannot train a tokenizer: all texts are empty")
