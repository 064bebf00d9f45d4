"""Fill-in-the-middle: the tokens that mark the parts of a document, and the transformation of rows
while a run trains. Needs no torch.

Source  Bavarian et al. 2022, arXiv:2207.14255: documents are cut at two characters (section 3);
        PSM is PRE prefix SUF suffix MID middle, and SPM, their variant 2 (appendix D), PRE SUF
        suffix MID prefix middle. A row keeps its length, as in Megatron's FIM data set: the suffix
        loses as many tokens at its end as are added.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, nearest
from castalia.data.config import DataConfig
from castalia.data.row_source import DocumentSpan
from castalia.data.sidecar import recorded_end
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

KNOWN_TOKENS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<PRE>", "<MID>", "<SUF>"),
)
"""Names of the three tokens in published tokenizers."""
DRAW_LIMIT = 1 << 64
"""Draws are integers below this."""
UNKNOWN_CHARACTER = "\ufffd"
"""What a character decodes to that a row's border cuts in two."""


class Sentinels(NamedTuple):
    """Ids of the tokens before prefix, middle and suffix."""

    prefix: int
    middle: int
    suffix: int

    def arranged(self, parts: Sequence[Any], *, spm: bool) -> list[Any]:
        """Prefix, middle and suffix as arrays, in the order of the document that is trained on."""
        prefix, middle, suffix = parts
        pre, mid, suf = ([sentinel] for sentinel in self)
        if spm:
            return [pre, suf, suffix, mid, prefix, middle]
        return [pre, prefix, suf, suffix, mid, middle]


def draws_of(key: bytes) -> tuple[int, int, int, int]:
    """Four integers below DRAW_LIMIT, a pure function of the key: whether to transform, in which
    order, and the two cuts."""
    digest = hashlib.sha256(key).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8)
    )
    return first, second, third, fourth


def parts_of(text: str, cuts: Sequence[int]) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text; `cuts` are two draws."""
    # Between characters, not bytes: each part must be valid UTF-8.
    start, stop = sorted(draw * (len(text) + 1) // DRAW_LIMIT for draw in cuts)
    return text[:start], text[start:stop], text[stop:]


@dataclass(frozen=True)
class FillInTheMiddle:
    """Transforms a share of the documents of each row as it is served.

    What happens to a document is a pure function of the seed, the row's place in the order of the
    run and its number within the row, so that ranks, workers and resumes agree, and the next pass
    over the same document cuts it elsewhere. `eod_id` ends a document within a span, as in files of
    ready rows; it stays where it is.
    """

    tokenizer: Tokenizer
    sentinels: Sentinels
    rate: float
    spm_rate: float
    seed: int
    eod_id: int | None = None

    def __call__(
        self, row: NDArray[np.int64], spans: Sequence[DocumentSpan], place: int
    ) -> NDArray[np.int64]:
        """The row served at `place`, (n,) -> (n,); padding after the spans stays."""
        row = row.copy()
        begin = 0
        number = 0
        for span in spans:
            for stop in self.ends(row[begin : begin + span.length]):
                document = row[begin : begin + stop]
                row[begin : begin + stop] = self.document(document, f"{place} {number}")
                begin += stop
                number += 1
        return row

    def ends(self, tokens: NDArray[np.int64]) -> list[int]:
        """The lengths of the documents of a span, their end-of-document tokens included."""
        if self.eod_id is None:
            return [len(tokens)]
        stops = [*(np.flatnonzero(tokens == self.eod_id) + 1).tolist(), len(tokens)]
        return np.diff([0, *dict.fromkeys(stops)]).tolist()

    def document(self, tokens: NDArray[np.int64], key: str) -> NDArray[np.int64]:
        """A document, or the part of it in this row, transformed if its draw says so."""
        chosen, order, *cuts = draws_of(f"{self.seed} {key}".encode())
        if chosen >= int(self.rate * DRAW_LIMIT):
            return tokens
        ended = bool(len(tokens)) and tokens[-1] == self.eod_id
        body = tokens[:-1] if ended else tokens
        text = self.tokenizer.decode(body)
        # Decoding a part of a character would not give its bytes back.
        if UNKNOWN_CHARACTER in text:
            return tokens
        parts = self.tokenizer.encode_batch(list(parts_of(text, cuts)))
        # The suffix pays for the three tokens, and for words that a cut divides into more tokens.
        surplus = sum(map(len, parts)) + len(self.sentinels) - len(body)
        if not 0 <= surplus < len(parts[2]):
            return tokens
        parts[2] = parts[2][: len(parts[2]) - surplus]
        ids = self.sentinels.arranged(parts, spm=order < int(self.spm_rate * DRAW_LIMIT))
        return np.concatenate([*ids, tokens[len(body) :]]).astype(np.int64)


def fill_in_the_middle(config: DataConfig, seed: int) -> FillInTheMiddle | None:
    """The transformation that data.fim_rate asks for; None without it.

    Raises  ConfigError if there is no tokenizer, or it lacks the three tokens.
    """
    if not config.fim_rate:
        return None
    if config.tokenizer is None:
        raise ConfigError(
            "data.fim_rate cuts documents at characters, so it needs data.tokenizer; set it to the"
            " tokenizer of the token files"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    sentinels = sentinels_of(tokenizer, config.fim_tokens, "data.fim_tokens")
    end = recorded_end(config.train_prefixes)
    if end is None:
        end = tokenizer.eod_id
    return FillInTheMiddle(tokenizer, sentinels, config.fim_rate, config.fim_spm_rate, seed, end)


def sentinels_of(tokenizer: Tokenizer, names: Sequence[str] | None, option: str) -> Sentinels:
    """The ids of the three tokens, by the names that `option` gives or the known ones.

    Raises  ConfigError if the tokenizer lacks them.
    """
    names = names or known_tokens(tokenizer)
    if names is None:
        tried = "; ".join(" ".join(names) for names in KNOWN_TOKENS)
        raise ConfigError(
            f"{tokenizer.where} has no tokens for fill-in-the-middle (looked for {tried}); name"
            f" three of its tokens or ids with {option} PREFIX,MIDDLE,SUFFIX"
        )
    return Sentinels(*(token_id(name, tokenizer, option) for name in names))


def known_tokens(tokenizer: Tokenizer) -> tuple[str, ...] | None:
    """The first triple of KNOWN_TOKENS that the tokenizer has."""
    for names in KNOWN_TOKENS:
        if all(name in tokenizer.ids for name in names):
            return names
    return None


def token_id(name: str, tokenizer: Tokenizer, option: str) -> int:
    """The id of a token that `option` names, by its text or as a number; a number is always an id.

    Raises  ConfigError if the tokenizer has no such token.
    """
    hint = ""
    if name.isdecimal():
        number = int(name)
    else:
        number = tokenizer.ids.get(name, tokenizer.vocab_size)
        hint = nearest(name, tokenizer.ids)
    if number < tokenizer.vocab_size:
        return number
    raise ConfigError(
        f"{option}: {name!r} is neither a token of {tokenizer.where} nor an id below"
        f" {tokenizer.vocab_size}{hint}"
    )
