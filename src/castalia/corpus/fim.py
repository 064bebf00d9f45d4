"""Fill-in-the-middle: documents cut in three with the middle moved to the end.

Models learn to fill gaps from them.
Source  Bavarian et al. 2022, arXiv:2207.14255: documents cut at two characters, before tokenization
        (section 3), in the orders PSM and SPM; the latter is their variant 2 (appendix D), as in
        Megatron's FIM data set.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from castalia.core.errors import ConfigError, nearest
from castalia.corpus.encoding import Encoded, Encoder, split_ids
from castalia.corpus.forms import TextForm
from castalia.data.tokenizer import Tokenizer

KNOWN_TOKENS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<PRE>", "<MID>", "<SUF>"),
)
"""Names of the three tokens in published tokenizers."""
DRAW_LIMIT = 1 << 64
"""Draws are integers below this."""


@dataclass(frozen=True)
class FimOptions:
    """How documents are transformed. Cuts depend on the text, `seed` and `epoch`."""

    rate: float = 0.5
    """Share of documents that are cut."""
    spm_rate: float = 0.5
    """Share of those in the order suffix, prefix, middle."""
    tokens: tuple[str, ...] | None = None
    """Names or ids of the tokens before prefix, middle and suffix; None looks for known names."""
    seed: int = 0
    epoch: int = 0
    """Gives the same corpus other cuts for another pass over it."""

    def problems(self) -> list[str]:
        """Sentences about invalid options."""
        rates = {"--fim-rate": self.rate, "--spm-rate": self.spm_rate}
        problems = [
            f"{name} {rate}: expected a share from 0 to 1"
            for name, rate in rates.items()
            if not 0 <= rate <= 1
        ]
        if self.tokens is not None and len(set(self.tokens)) != 3:
            problems.append(
                f"--fim-tokens {','.join(self.tokens)}: expected PREFIX,MIDDLE,SUFFIX, three"
                " different tokens"
            )
        return problems


@dataclass(frozen=True)
class FimForm(TextForm):
    """Documents of which a share is transformed.

    PSM is PRE prefix SUF suffix MID middle; SPM is PRE SUF suffix MID prefix middle. `sentinels`
    are the ids of PRE, MID and SUF.
    """

    options: FimOptions
    sentinels: tuple[int, int, int]

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for PREFIX.json."""
        return {"fim": {**asdict(self.options), "tokens": list(self.sentinels)}}

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """Ids of the texts, transformed where their draw says so; empty texts stay empty."""
        cuts = [self.cut(text) for text in texts]
        # One call for all pieces: the encoder is fastest on many texts at once.
        ids, sizes = encoder([piece for cut in cuts for piece in cut])
        pieces = iter(split_ids(ids, sizes))
        documents = [
            self.transformed([next(pieces) for _ in cut], text)
            for cut, text in zip(cuts, texts, strict=True)
        ]
        lengths = np.array([len(document) for document in documents], np.int64)
        return [(np.concatenate([np.empty(0, ids.dtype), *documents]), lengths)]

    def cut(self, text: bytes) -> list[bytes]:
        """Prefix, middle and suffix of a text to transform; else the text alone."""
        chosen, _, first, second = draws(text, self.options)
        if not text or chosen >= int(self.options.rate * DRAW_LIMIT):
            return [text]
        # Between characters, not bytes: each piece must be valid UTF-8.
        characters = text.decode("utf-8")
        start, stop = sorted(draw * (len(characters) + 1) // DRAW_LIMIT for draw in (first, second))
        pieces = (characters[:start], characters[start:stop], characters[stop:])
        return [piece.encode("utf-8") for piece in pieces]

    def transformed(self, pieces: list[Any], text: bytes) -> Any:
        """The ids of a document from those of its pieces."""
        if len(pieces) == 1:
            return pieces[0]
        prefix, middle, suffix = pieces
        pre, mid, suf = ([sentinel] for sentinel in self.sentinels)
        if draws(text, self.options)[1] < int(self.options.spm_rate * DRAW_LIMIT):
            order = [pre, suf, suffix, mid, prefix, middle]
        else:
            order = [pre, prefix, suf, suffix, mid, middle]
        return np.concatenate(order).astype(prefix.dtype)


def draws(text: bytes, options: FimOptions) -> tuple[int, int, int, int]:
    """Four integers below DRAW_LIMIT: whether to transform, in which order, and the two cuts.

    They depend on text, seed and epoch alone, so a document is cut alike in any part of any job.
    """
    digest = hashlib.sha256(f"{options.seed} {options.epoch} ".encode() + text).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8)
    )
    return first, second, third, fourth


def make_fim(options: FimOptions, tokenizer: Tokenizer) -> FimForm:
    """The form, with the ids of the three tokens.

    Raises  ConfigError if the tokenizer lacks them.
    """
    names = options.tokens or known_tokens(tokenizer)
    if names is None:
        tried = "; ".join(" ".join(names) for names in KNOWN_TOKENS)
        raise ConfigError(
            f"{tokenizer.where} has no tokens for fill-in-the-middle (looked for {tried}); name"
            " three of its tokens or ids with --fim-tokens PREFIX,MIDDLE,SUFFIX"
        )
    pre, mid, suf = (token_id(name, tokenizer, "--fim-tokens") for name in names)
    return FimForm(options, (pre, mid, suf))


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
