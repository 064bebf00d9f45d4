"""Texts to ids by the quickest way that gives exactly the ids of the tokenizer, held against it all along.

Source  gigatoken, github.com/marcelroed/gigatoken: byte-level BPE with a cache of words.
"""

import importlib
import os
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.memory import resident_bytes
from castalia.corpus.young import Young
from castalia.data.indexed import best_dtype
from castalia.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer

Encoded = tuple[NDArray[Any], NDArray[np.int64]]
"""Ids (n,) of several texts back to back, and how many (m,) each text has."""
Quick = Callable[[Sequence[bytes]], Encoded]
WORDS_BYTES = 320 << 20
"""How much a process may grow before gigatoken, which keeps every word that it has seen, starts anew."""
WINDOW = 4096
"""Bytes of a sampled text that are encoded both ways: about one in a thousand of a batch."""
LONG_TEXT, FEW_TEXTS = 1000, 256
"""Mean bytes from which, and number up to which, texts go to gigatoken one by one: then a call a text costs nothing,
and its way of returning many at once, which takes 0.2 s to import, is not needed."""
PROBES = (
    "",
    " ",
    "Hello world, it's we'll I'M don’t 1234567 3.14",
    "  two  three   \n\n\n \t tabs\r\n end ",
    "def f(x):\n        return {'a': [1, 2.0e-3], \"b\": None}  # ok\n\n\n",
    "Straße, naïve café: e\u0301 \u1112\u1161\u11ab ﬁ ½ ①",
    "数学と中文，한국어 עברית العربية ไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦 \u200b\u200d\ufeff\u00a0\u3000x",
    "\x00\x01\x7f \u0085 \u2028 \ufffd",
    "a" * 300 + " " * 300 + "\n" * 50 + "=" * 100,
    "http://example.org/a?b=c&d=%20#e <html><p>x</p></html> $\\frac{1}{2}$",
)
"""Texts in which tokenizers differ: contractions, spaces, digits, scripts, forms that Unicode makes one."""


class MismatchError(Exception):
    """The quick way gave other ids than the tokenizer for a sampled text."""


class Encoder:
    """Texts to ids: bytes by numpy, else gigatoken where it is installed and equal to the tokenizer, else the
    tokenizer itself. `why_slow` says why gigatoken is not used, None if it is; `by` names what is.

    Raises  MismatchError if a text of the sample comes out differently; `slow()` makes it give up the quick way.
    """

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True) -> None:
        self.tokenizer, self.dtype = tokenizer, best_dtype(tokenizer.vocab_size)
        self.quick: Quick | None = None
        self.why_slow: str | None = "it is turned off"
        if type(tokenizer) is ByteTokenizer:
            self.quick, self.why_slow = bytes_as_ids, None
        elif fast:
            self.quick, self.why_slow = gigatoken(tokenizer)
        self.start_bytes, self.young = resident_bytes(), Young(self.same)

    @property
    def by(self) -> str:
        """What encodes."""
        if self.quick is None:
            return self.tokenizer.kind if self.tokenizer.kind != "json" else "tokenizers"
        return "numpy" if self.quick is bytes_as_ids else "gigatoken"

    def __call__(self, texts: Sequence[bytes]) -> Encoded:
        """Ids and their number for each text of UTF-8."""
        if self.quick is None or not texts:
            return self.reference(texts)
        if self.quick is not bytes_as_ids and any(young := [self.young(text) for text in texts]):
            return self.mixed(texts, young)
        ids, sizes = self.quick(texts)
        if self.quick is not bytes_as_ids:
            self.compare(texts, ids, sizes)
            self.forget_words()
        return ids.astype(self.dtype, copy=False), sizes

    def forget_words(self) -> None:
        """Give gigatoken's memory back when it has become too much."""
        if resident_bytes() - self.start_bytes > WORDS_BYTES:
            self.quick = None
            self.quick, self.why_slow = gigatoken(self.tokenizer)
            self.start_bytes = resident_bytes()

    def mixed(self, texts: Sequence[bytes], young: Sequence[bool]) -> Encoded:
        """Texts with young characters by the tokenizer, the others by the quick way, in their order."""
        plain = [text for text, is_young in zip(texts, young, strict=True) if not is_young]
        parts = [
            self(plain),
            self.reference([text for text, is_young in zip(texts, young, strict=True) if is_young]),
        ]
        pieces = [iter(pieces_of(*part)) for part in parts]
        found = [next(pieces[is_young]) for is_young in young]
        return np.concatenate(found).astype(self.dtype, copy=False), np.array(
            [len(ids) for ids in found], np.int64
        )

    def slow(self) -> "Encoder":
        """The same with the tokenizer alone."""
        return Encoder(self.tokenizer, fast=False)

    def reference(self, texts: Sequence[bytes]) -> Encoded:
        """Ids by the tokenizer."""
        found = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        sizes = np.array([len(ids) for ids in found], dtype=np.int64)
        return np.fromiter(chain.from_iterable(found), self.dtype, int(sizes.sum())), sizes

    def same(self, texts: Sequence[str]) -> list[bool]:
        """For which of these both ways give the same ids."""
        assert self.quick is not None
        quick, known = (
            pieces_of(*way([t.encode("utf-8") for t in texts]))
            for way in (self.quick, self.reference)
        )
        return [np.array_equal(a, b) for a, b in zip(quick, known, strict=True)]

    def compare(self, texts: Sequence[bytes], ids: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Hold one text of the batch, or the beginning of a long one, against the tokenizer."""
        if len(sizes) != len(texts) or sizes.sum() != len(ids):
            raise MismatchError(f"{len(sizes)} texts and {len(ids)} ids for {len(texts)} texts")
        chosen = zlib.crc32(texts[0][:WINDOW]) % len(texts)
        text = texts[chosen]
        if len(text) <= WINDOW:
            stop = int(sizes[: chosen + 1].sum())
            got = ids[stop - int(sizes[chosen]) : stop]
        else:
            text = text[:WINDOW].decode("utf-8", "ignore").encode("utf-8")
            assert self.quick is not None
            got, _ = self.quick([text])
        if not np.array_equal(got, self.reference([text])[0]):
            raise MismatchError(f"text {chosen} of a batch of {len(texts)}")


def bytes_as_ids(texts: Sequence[bytes]) -> Encoded:
    """The ids of `ByteTokenizer`: the bytes themselves, and 256 where a text spells out <|endoftext|>."""
    joined = b"".join(texts)
    mark = END_OF_TEXT.encode()
    if mark not in joined:
        return np.frombuffer(joined, np.uint8).astype("<u2"), np.array(
            [len(text) for text in texts], dtype=np.int64
        )
    ids = [ids_with_marks(text, mark) for text in texts]
    return np.concatenate([np.empty(0, "<u2"), *ids]), np.array(
        [len(found) for found in ids], dtype=np.int64
    )


def ids_with_marks(text: bytes, mark: bytes) -> NDArray[np.uint16]:
    """Bytes of one text, each mark as one id."""
    pieces: list[NDArray[np.uint16]] = []
    for i, piece in enumerate(text.split(mark)):
        pieces += [np.array([256], "<u2")] * (i > 0) + [
            np.frombuffer(piece, np.uint8).astype("<u2")
        ]
    return np.concatenate(pieces)


def gigatoken(tokenizer: Tokenizer) -> tuple[Quick | None, str | None]:
    """gigatoken for a tokenizer, or why not: not installed, unable to read it, or other ids in a probe."""
    try:
        module = importlib.import_module("gigatoken")
    except ImportError:
        return None, "gigatoken is not installed (pip install 'castalia[fast]')"
    if tokenizer.kind != "json":
        return None, f"gigatoken reads no {tokenizer.kind} tokenizer here"
    try:
        inner = module.Tokenizer.from_json(tokenizer.text)
        quick = quick_by(inner)
        texts = probes(tokenizer)
        ids, sizes = quick([text.encode("utf-8") for text in texts])
    except Exception as error:  # whatever it raises, the tokenizer itself serves
        return None, f"gigatoken cannot read this tokenizer ({error})"
    known = tokenizer.encode_batch(texts)
    if [len(found) for found in known] != sizes.tolist() or list(
        chain.from_iterable(known)
    ) != ids.tolist():
        return None, "gigatoken gives other ids than tokenizers for the texts it is tried with"
    return quick, None


def quick_by(inner: Any) -> Quick:
    """Ids by gigatoken on this thread alone: a process is a core."""

    def encode(texts: Sequence[bytes]) -> Encoded:
        if len(texts) <= FEW_TEXTS or sum(map(len, texts)) >= LONG_TEXT * len(texts):
            found = [inner.backend.encode(text) for text in texts]
            return np.concatenate(found), np.array([len(ids) for ids in found], dtype=np.int64)
        layout = inner.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)

    return encode


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts to try a tokenizer with, its own special tokens in and around words."""
    added = [token.content for token in tokenizer.inner.get_added_tokens_decoder().values()]
    marked = [
        text
        for name in added[:64]
        for text in (name, f"a{name}b", f"a {name} b", f"{name}{name}\n{name}")
    ]
    return [*PROBES, *marked, "\n".join(PROBES)]


def pieces_of(ids: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The ids of each text by itself."""
    return np.split(ids, np.cumsum(sizes)[:-1]) if len(sizes) else []


def with_ends(ids: NDArray[Any], sizes: NDArray[np.int64], end: int | None) -> Encoded:
    """Empty texts left out, and `end` after each of the others unless it is None."""
    sizes = sizes[sizes > 0]
    if end is None or not len(sizes):
        return ids, sizes
    sizes = sizes + 1
    out = np.empty(len(ids) + len(sizes), ids.dtype)
    inner = np.ones(len(out), bool)
    inner[np.cumsum(sizes) - 1] = False
    out[inner], out[~inner] = ids, end
    return out, sizes


def leave_cores() -> None:
    """In a worker process: the libraries leave the other cores to the other workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
