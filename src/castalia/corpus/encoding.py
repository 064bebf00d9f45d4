"""Texts to ids, by the fastest way that gives exactly the tokenizer's ids; checked all along.

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
from castalia.corpus.recent_characters import RecentCharacters
from castalia.data.indexed import best_dtype
from castalia.tokenizers.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer

Encoded = tuple[NDArray[Any], NDArray[np.int64]]
"""Ids (n,) of several texts back to back, and the number of ids of each text (m,)."""
FastPath = Callable[[Sequence[bytes]], Encoded]
CACHE_BYTES = 320 << 20
"""Growth of the process after which gigatoken is restarted: it caches every word forever. With the
rest of a worker this keeps below 0.6 GB."""
SAMPLE_BYTES = 4096
"""Bytes of a sampled text that are encoded both ways: about a thousandth of a batch."""
LONG_TEXT = 1000
FEW_TEXTS = 256
"""Texts of at least LONG_TEXT bytes on average, or at most FEW_TEXTS of them, go to gigatoken one
by one. Then a call for each costs nothing, and gigatoken's batch call is not needed, whose first
use imports for 0.2 s."""
ADDED_TOKENS_PROBED = 64
BYTE_EOD = 256
"""ByteTokenizer's id of <|endoftext|>."""
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
"""Texts on which tokenizers differ: contractions, spaces, digits, scripts, Unicode compositions."""


class MismatchError(Exception):
    """The fast path gave other ids than the tokenizer for a sampled text."""


class Encoder:
    """Encodes texts: bytes by numpy; else by gigatoken, if it agrees with the tokenizer; else by
    the tokenizer itself.

    `fallback_reason` says why gigatoken is not used, None if it is.
    Raises  MismatchError if a sampled text comes out differently; take `slow()` then.
    """

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True) -> None:
        self.tokenizer = tokenizer
        self.dtype = best_dtype(tokenizer.vocab_size)
        self.fast_path: FastPath | None = None
        self.fallback_reason: str | None = "gigatoken is turned off"
        if type(tokenizer) is ByteTokenizer:
            self.fast_path = bytes_as_ids
            self.fallback_reason = None
        elif fast:
            self.fast_path, self.fallback_reason = gigatoken(tokenizer)
        self.start_bytes = resident_bytes()
        self.has_recent = RecentCharacters(self.same)

    @property
    def by(self) -> str:
        """The name of the library that encodes."""
        if self.fast_path is bytes_as_ids:
            return "numpy"
        if self.fast_path is not None:
            return "gigatoken"
        return self.tokenizer.kind if self.tokenizer.kind != "json" else "tokenizers"

    def __call__(self, texts: Sequence[bytes]) -> Encoded:
        """Ids of texts in UTF-8, and the number of ids of each."""
        if self.fast_path is None or not texts:
            return self.reference(texts)
        if self.fast_path is bytes_as_ids:
            ids, sizes = bytes_as_ids(texts)
            return ids.astype(self.dtype, copy=False), sizes
        recent = [self.has_recent(text) for text in texts]
        if any(recent):
            return self.mixed(texts, recent)
        ids, sizes = self.fast_path(texts)
        self.compare_sample(texts, ids, sizes)
        self.limit_cache()
        return ids.astype(self.dtype, copy=False), sizes

    def limit_cache(self) -> None:
        """Restart gigatoken when its cache has grown too large."""
        if resident_bytes() - self.start_bytes > CACHE_BYTES:
            self.fast_path = None  # freed before the new one is built
            self.fast_path, self.fallback_reason = gigatoken(self.tokenizer)
            self.start_bytes = resident_bytes()

    def mixed(self, texts: Sequence[bytes], recent: Sequence[bool]) -> Encoded:
        """Texts with recent characters by the tokenizer, the others by the fast path, in order."""
        pairs = list(zip(texts, recent, strict=True))
        fast = iter(split_ids(*self([text for text, is_recent in pairs if not is_recent])))
        slow = iter(split_ids(*self.reference([text for text, is_recent in pairs if is_recent])))
        ids = [next(slow if is_recent else fast) for is_recent in recent]
        sizes = np.array([len(own) for own in ids], np.int64)
        return np.concatenate(ids).astype(self.dtype, copy=False), sizes

    def slow(self) -> "Encoder":
        """An encoder of the same tokenizer without the fast path."""
        return Encoder(self.tokenizer, fast=False)

    def reference(self, texts: Sequence[bytes]) -> Encoded:
        """Ids by the tokenizer itself."""
        ids = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        sizes = np.array([len(own) for own in ids], dtype=np.int64)
        return np.fromiter(chain.from_iterable(ids), self.dtype, int(sizes.sum())), sizes

    def same(self, texts: Sequence[str]) -> list[bool]:
        """Whether both ways give equal ids, for each text."""
        assert self.fast_path is not None
        encoded = [text.encode("utf-8") for text in texts]
        fast = split_ids(*self.fast_path(encoded))
        slow = split_ids(*self.reference(encoded))
        return [np.array_equal(a, b) for a, b in zip(fast, slow, strict=True)]

    def compare_sample(
        self, texts: Sequence[bytes], ids: NDArray[Any], sizes: NDArray[np.int64]
    ) -> None:
        """Compare one text of the batch, or the beginning of a long one, with the tokenizer.

        Raises  MismatchError.
        """
        if len(sizes) != len(texts) or sizes.sum() != len(ids):
            raise MismatchError(f"{len(sizes)} texts and {len(ids)} ids for {len(texts)} texts")
        # Chosen by content: the same text is sampled on every run and any number of workers.
        chosen = zlib.crc32(texts[0][:SAMPLE_BYTES]) % len(texts)
        text = texts[chosen]
        if len(text) <= SAMPLE_BYTES:
            stop = int(sizes[: chosen + 1].sum())
            fast = ids[stop - int(sizes[chosen]) : stop]
        else:
            text = text[:SAMPLE_BYTES].decode("utf-8", "ignore").encode("utf-8")
            assert self.fast_path is not None
            fast, _ = self.fast_path([text])
        if not np.array_equal(fast, self.reference([text])[0]):
            raise MismatchError(f"text {chosen} of a batch of {len(texts)}")


def bytes_as_ids(texts: Sequence[bytes]) -> Encoded:
    """The ids of `ByteTokenizer`: the bytes themselves, and 256 for a written-out <|endoftext|>."""
    joined = b"".join(texts)
    mark = END_OF_TEXT.encode()
    if mark not in joined:
        sizes = np.array([len(text) for text in texts], dtype=np.int64)
        return np.frombuffer(joined, np.uint8).astype("<u2"), sizes
    ids = [ids_with_marks(text, mark) for text in texts]
    sizes = np.array([len(own) for own in ids], dtype=np.int64)
    return np.concatenate([np.empty(0, "<u2"), *ids]), sizes


def ids_with_marks(text: bytes, mark: bytes) -> NDArray[np.uint16]:
    """The bytes of one text, each mark as one id."""
    ids: list[NDArray[np.uint16]] = []
    for i, plain in enumerate(text.split(mark)):
        if i > 0:
            ids.append(np.array([BYTE_EOD], "<u2"))
        ids.append(np.frombuffer(plain, np.uint8).astype("<u2"))
    return np.concatenate(ids)


def gigatoken(tokenizer: Tokenizer) -> tuple[FastPath | None, str | None]:
    """gigatoken for a tokenizer, or None and the reason against it.

    Reasons: it is not installed, cannot read the tokenizer, or gives other ids for a probe.
    """
    try:
        module = importlib.import_module("gigatoken")
    except ImportError:
        return None, "gigatoken is not installed: pip install gigatoken"
    if tokenizer.kind != "json":
        return None, f"gigatoken does not support {tokenizer.kind} tokenizers here"
    texts = probes(tokenizer)
    try:
        fast_path = fast_path_of(module.Tokenizer.from_json(tokenizer.text))
        ids, sizes = fast_path([text.encode("utf-8") for text in texts])
    except Exception as error:  # whatever it raises, the tokenizer itself serves
        return None, f"gigatoken cannot read this tokenizer ({error})"
    expected = tokenizer.encode_batch(texts)
    has_same_sizes = [len(own) for own in expected] == sizes.tolist()
    if not has_same_sizes or list(chain.from_iterable(expected)) != ids.tolist():
        return None, "gigatoken and tokenizers give different ids for the probe texts"
    return fast_path, None


def fast_path_of(inner: Any) -> FastPath:
    """Encoding by gigatoken on this thread alone: each worker process has one core."""

    def encode(texts: Sequence[bytes]) -> Encoded:
        if len(texts) <= FEW_TEXTS or sum(map(len, texts)) >= LONG_TEXT * len(texts):
            each = [inner.backend.encode(text) for text in texts]
            return np.concatenate(each), np.array([len(ids) for ids in each], dtype=np.int64)
        layout = inner.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)

    return encode


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts to try a tokenizer with: PROBES, and its own added tokens in and around words."""
    added = [token.content for token in tokenizer.inner.get_added_tokens_decoder().values()]
    marked: list[str] = []
    for name in added[:ADDED_TOKENS_PROBED]:
        marked += [name, f"a{name}b", f"a {name} b", f"{name}{name}\n{name}"]
    return [*PROBES, *marked, "\n".join(PROBES)]


def split_ids(ids: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The ids of each text by itself."""
    if not len(sizes):
        return []
    return np.split(ids, np.cumsum(sizes)[:-1])


def with_ends(ids: NDArray[Any], sizes: NDArray[np.int64], end: int | None) -> Encoded:
    """Drop empty texts and append `end` to each of the others, unless it is None."""
    sizes = sizes[sizes > 0]
    if end is None or not len(sizes):
        return ids, sizes
    sizes = sizes + 1
    out = np.empty(len(ids) + len(sizes), ids.dtype)
    is_text = np.ones(len(out), bool)
    is_text[np.cumsum(sizes) - 1] = False
    out[is_text] = ids
    out[~is_text] = end
    return out, sizes


def leave_cores() -> None:
    """Restrict the libraries of a worker process to one core; the other workers use the rest."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
