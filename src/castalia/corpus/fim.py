"""Fill-in-the-middle: documents cut in three, the middle moved to the end, so that a model learns to fill gaps.

Source  Bavarian et al. 2022, arXiv:2207.14255: documents cut at two characters, before tokenization (§3), in the
        orders PSM and SPM, of which the latter is their variant 2 (appendix D), as in Megatron's FIM data set.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from castalia.core.errors import ConfigError, nearest
from castalia.corpus.encoding import Encoded, Encoder, pieces_of
from castalia.corpus.forms import Texts
from castalia.data.tokenizer import Tokenizer

KNOWN = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<PRE>", "<MID>", "<SUF>"),
)
"""Names of the three tokens that tokenizers in the field have."""
ONE = 1 << 64
"""Draws are whole numbers below this."""


@dataclass(frozen=True)
class FimOptions:
    """How documents are turned.

    `rate` is the share of documents that are cut, `spm_rate` the share of these in the order suffix, prefix, middle;
    `tokens` are the ids or names that stand before prefix, middle and suffix, None: those that the tokenizer has.
    Cuts depend on the text, `seed` and `epoch`, which gives the same corpus other cuts for each pass over it.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    tokens: tuple[str, ...] | None = None
    seed: int = 0
    epoch: int = 0

    def problems(self) -> list[str]:
        """What is wrong with them."""
        rates = {"--fim-rate": self.rate, "--spm-rate": self.spm_rate}
        wrong = [
            f"{name} {rate}: expected a share, 0 to 1"
            for name, rate in rates.items()
            if not 0 <= rate <= 1
        ]
        if self.tokens is not None and len(set(self.tokens)) != 3:
            wrong.append(
                f"--fim-tokens {','.join(self.tokens)}: expected PREFIX,MIDDLE,SUFFIX, three different tokens"
            )
        return wrong


@dataclass(frozen=True)
class Fim(Texts):
    """Documents of which a share is turned: PSM is PRE prefix SUF suffix MID middle, SPM is PRE SUF suffix MID prefix
    middle. `sentinels` are the ids of PRE, MID and SUF. What is decoded without these is the document again."""

    options: FimOptions
    sentinels: tuple[int, int, int]

    @property
    def facts(self) -> dict[str, Any]:
        """For PREFIX.json."""
        return {"fim": {**asdict(self.options), "tokens": list(self.sentinels)}}

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """Ids of the texts, turned where their draw says so; an empty text stays empty."""
        cuts = [self.cut(text) for text in texts]
        ids, sizes = encoder([piece for cut in cuts for piece in cut])
        each = iter(pieces_of(ids, sizes))
        found = [
            self.turned([next(each) for _ in cut], text)
            for cut, text in zip(cuts, texts, strict=True)
        ]
        lengths = np.array([len(one) for one in found], np.int64)
        return [(np.concatenate([np.empty(0, ids.dtype), *found]), lengths)]

    def cut(self, text: bytes) -> list[bytes]:
        """Prefix, middle and suffix of a text that is turned, else the text: [1] or [3] pieces."""
        chosen, _, first, second = draws(text, self.options)
        if not text or chosen >= int(self.options.rate * ONE):
            return [text]
        letters = text.decode("utf-8")
        start, stop = sorted(draw * (len(letters) + 1) // ONE for draw in (first, second))
        return [
            piece.encode("utf-8")
            for piece in (letters[:start], letters[start:stop], letters[stop:])
        ]

    def turned(self, pieces: list[Any], text: bytes) -> Any:
        """The ids of a document out of those of its pieces."""
        if len(pieces) == 1:
            return pieces[0]
        prefix, middle, suffix = pieces
        pre, mid, suf = ([id_] for id_ in self.sentinels)
        spm = draws(text, self.options)[1] < int(self.options.spm_rate * ONE)
        order = (
            [pre, suf, suffix, mid, prefix, middle]
            if spm
            else [pre, prefix, suf, suffix, mid, middle]
        )
        return np.concatenate(order).astype(prefix.dtype)


def draws(text: bytes, options: FimOptions) -> tuple[int, int, int, int]:
    """Four numbers below ONE that depend on text, seed and epoch alone: turned or not, in which order, the two cuts."""
    digest = hashlib.sha256(f"{options.seed} {options.epoch} ".encode() + text).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8)
    )
    return first, second, third, fourth


def make_fim(options: FimOptions, tokenizer: Tokenizer) -> Fim:
    """The form, with the ids of the three tokens.

    Raises  ConfigError if the tokenizer does not have them.
    """
    names = options.tokens or next(
        (names for names in KNOWN if all(name in tokenizer.ids for name in names)), None
    )
    if names is None:
        tried = "; ".join(" ".join(found) for found in KNOWN)
        raise ConfigError(
            f"{tokenizer.where} has no tokens for filling in the middle (tried {tried}); name three of its tokens or"
            " ids with --fim-tokens PREFIX,MIDDLE,SUFFIX"
        )
    pre, mid, suf = (token_id(name, tokenizer) for name in names)
    return Fim(options, (pre, mid, suf))


def token_id(name: str, tokenizer: Tokenizer) -> int:
    """The id of a token named by its text, or by a number, which is always an id.

    Raises  ConfigError if there is no such token.
    """
    known = int(name) if name.isdecimal() else tokenizer.ids.get(name, tokenizer.vocab_size)
    if known < tokenizer.vocab_size:
        return known
    raise ConfigError(
        f"--fim-tokens: {name!r} is neither a token of {tokenizer.where} nor an id below {tokenizer.vocab_size}"
        f"{nearest(name, tokenizer.ids) if not name.isdecimal() else ''}"
    )
